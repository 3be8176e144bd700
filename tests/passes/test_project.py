"""The pass ``project``: an edit that the published weights and the recipe do not undo."""

from __future__ import annotations

import pytest
import torch
from concepts import STAR
from torch import Tensor

from erasec.base import Context, Pass
from erasec.checkpoint.folder import head_count
from erasec.closed_form.token_rows import neutral_rows
from erasec.model.edit import LowRank, Remap
from erasec.model.view import Model
from erasec.passes.project import Project
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

HEART = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))


@pytest.fixture
def model(base: Model) -> Model:
    return base


def shared_map(step: Pass, model: Model) -> Tensor:
    """M of the keys, whose edit is a map of the text states alone."""
    edit = step.solve(model, STAR, Context())
    site = next(site for site in edit.deltas if site.proj == "k")
    unit = torch.eye(site.shape[1], dtype=torch.float64)
    return unit + edit.deltas[site].change(unit)


def undone(step: Pass, model: Model) -> float:
    """What an attacker with the published weights and the recipe is left with: the distance of W' M^+ from W of the
    keys, at the outputs of the concept and relative to these. M is solved again on the published weights."""
    published = model.with_edit(step.solve(model, STAR, Context()))
    inverse = torch.linalg.pinv(shared_map(step, published), rtol=1e-9)
    ((rows, neutral),) = neutral_rows(model, STAR, "context")
    concept = (rows.double() - neutral.double()).T
    gaps, whole = 0.0, 0.0
    for site in model.select("cross", "k"):
        weight, edited = model.weight(site).double(), published.weight(site).double()
        gaps += float(((edited @ inverse - weight) @ concept).pow(2).sum())
        whole += float((weight @ concept).pow(2).sum())
    return (gaps / whole) ** 0.5


def test_the_inverse_from_weights_and_recipe_does_not_bring_the_concept_back(model: Model) -> None:
    assert undone(Project(), model) > 0.5
    assert undone(Uce(), model) < 0.05  # the attack works on an invertible edit


def test_keys_get_one_map_and_values_lose_outputs_of_each_head(model: Model) -> None:
    edit = Project().solve(model, STAR, Context())
    keys = {id(edit.deltas[site]) for site in model.select("cross", "k")}
    assert len(keys) == 1
    assert edit.stats["sigma_min"] < 1e-6
    plain = Project(heads=0).solve(model, STAR, Context())
    for site in model.select("cross", "v"):
        assert isinstance(edit.deltas[site], LowRank)
        assert isinstance(plain.deltas[site], Remap)
        weight = model.stored_weight(site).double()
        projected = weight + plain.deltas[site].change(weight)
        values = weight + edit.deltas[site].change(weight)
        # What was removed lies in few directions, and none of it is left.
        basis, strengths, _ = torch.linalg.svd(projected - values, full_matrices=False)
        removed = basis[:, strengths > 1e-9 * strengths[0]]
        assert 1 <= removed.shape[1] <= 2 * head_count(model.source.config("unet"), site.key)
        assert float((removed.T @ values).abs().max()) < 1e-6 * float(values.abs().max())


def test_only_edits_without_heads_can_be_combined_from_their_sums(model: Model) -> None:
    assert not Project().solve(model, STAR, Context()).sums
    step = Project(heads=0)
    alone = [step.solve(model, concept, Context()) for concept in (STAR, HEART)]
    together = next(step.solve_all(model, [STAR, HEART], Context()))
    sums = {name: value for edit in alone for name, value in edit.sums.items()}
    combined = step.edit_from_sums(model.streams, sums, model.digest)
    for site in together.deltas:
        weight = model.stored_weight(site)
        assert torch.equal(combined.deltas[site].change(weight), together.deltas[site].change(weight))


def test_the_order_of_concepts_does_not_matter(model: Model) -> None:
    first, second = (next(Project().solve_all(model, order, Context())) for order in ([STAR, HEART], [HEART, STAR]))
    for site in first.deltas:
        weight = model.stored_weight(site)
        assert torch.equal(first.deltas[site].change(weight), second.deltas[site].change(weight))


def test_neutral_states_are_the_mean_of_kept_phrases_at_the_same_places(model: Model) -> None:
    concept = Concept(name="star", erase=("star",), templates=("{}", "a {} on navy"), keep=("square", "big ring"))
    ((rows, neutral),) = neutral_rows(model, concept, "context")
    texts = ("square on navy", "big ring on navy", "star on navy")
    starts = [int(model.last_tokens([f"a {text.removesuffix(' on navy')}"])[0]) for text in texts]
    count = 77 - max(starts)
    states = model.encode([f"a {text}" for text in texts]).states
    square, ring, star = (states[row, start : start + count] for row, start in enumerate(starts))
    assert torch.equal(rows[-count:], star)
    assert torch.allclose(neutral[-count:], (square + ring) / 2)


def test_a_concept_without_kept_phrases_is_told_from_its_goal(model: Model) -> None:
    bare = STAR.model_copy(update={"keep": ()})
    edit = Project().solve(model, bare, Context())
    assert edit.stats["rank"] == 2


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"attention_head_dim": 8}, (8, 8, 8)),
        ({"attention_head_dim": [5, 10, 20, 20]}, (5, 20, 20)),
        ({"num_attention_heads": 4, "attention_head_dim": 8}, (4, 4, 4)),
        ({}, (8, 8, 8)),
    ],
)
def test_heads_follow_the_level_of_the_block(config: dict[str, object], heads: tuple[int, ...]) -> None:
    keys = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0")
    assert tuple(head_count(config, f"{key}.transformer_blocks.0.attn2.to_v.weight") for key in keys) == heads


def test_many_concepts_that_take_most_directions_are_named(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ring", "arrow", "cross", "heart", "crescent", "diamond", "circle", "square")
    many = [Concept(name=name, erase=(name,), anchor="box", templates=("{}", "a {}")) for name in names]
    next(Project(directions=1, heads=0).solve_all(model, many[:2], Context()))
    assert "directions of the text states" not in capsys.readouterr().err
    next(Project(directions=40, heads=0).solve_all(model, many, Context()))
    assert "of 128 directions of the text states, so that what is kept suffers" in capsys.readouterr().err
