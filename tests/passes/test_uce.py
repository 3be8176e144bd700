"""UCE on a model with random weights: the paper's formula at every site, and what must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept, find

CONCEPT = Concept(name="star", erase=("star",), synonyms=("pentagram",), anchor="circle", keep=("square", "ring"))


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return loading.load(str(random_folder))


@pytest.mark.parametrize(("bundled", "step"), [(False, Uce(ridge=0.05)), (True, Uce())])
def test_edited_weights_match_the_papers_formula_site_by_site(model: Model, bundled: bool, step: Uce) -> None:
    """W' from equation 7 with explicit rows and an explicit inverse at every site, in float64: on random weights, and
    for the shipped concept and defaults on glyphs."""
    concept = find("star", "glyphs") if bundled else CONCEPT
    model = loading.load("glyphs") if bundled else model
    edit = step.solve(model, concept, Context())
    prompts, anchors = concept.prompts(concept.phrases), concept.prompts([concept.anchor] * len(concept.phrases))
    erase, goal = (model.encode([prompt.text for prompt in side]).states.double() for side in (prompts, anchors))
    starts, stops = (model.last_tokens([prompt.upto for prompt in side]).tolist() for side in (prompts, anchors))
    source, target = [], []
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        count = min(77 - start, 77 - stop)
        source.append(erase[row, start : start + count])
        target.append(goal[row, stop : stop + count])
    keep = model.encode(["", *(prompt.text for prompt in concept.prompts(concept.keep))]).states.flatten(0, 1).double()
    c, v = torch.cat(source), torch.cat(target)
    gram = c.T @ c / len(c) + keep.T @ keep / len(keep)
    lam = step.ridge * gram.diagonal().mean()
    for site in model.select("cross", "kv"):
        weight = model.stored_weight(site).double()
        left = lam * weight + (weight @ v.T) @ c / len(c) + (weight @ keep.T) @ keep / len(keep)
        expected = left @ torch.linalg.inv(gram + lam * torch.eye(len(gram), dtype=torch.float64))
        delta = edit.deltas[site]
        assert float((weight + delta.change(weight) - expected).norm() / (expected - weight).norm()) < 1e-6


def test_only_cross_attention_keys_and_values_move(model: Model) -> None:
    edit = Uce().solve(model, CONCEPT, Context())
    assert {(site.attn, site.proj) for site in edit.deltas} == {("cross", "k"), ("cross", "v")}
    assert len(edit.deltas) == 14
    assert len({id(delta) for delta in edit.deltas.values()}) == 1


def test_the_edit_is_deterministic_and_names_its_base(model: Model) -> None:
    one, two = (Uce().solve(model, CONCEPT, Context()) for _ in range(2))
    assert one.stats == two.stats
    assert one.base == model.digest
    for site, delta in one.deltas.items():
        weight = model.stored_weight(site)
        assert torch.equal(delta.change(weight), two.deltas[site].change(weight))


def test_a_second_edit_starts_from_the_edited_weights(model: Model) -> None:
    """A second edit multiplies the first one's weights: W M1 M2, not W (M1 + M2 - I)."""
    first = Uce().solve(model, CONCEPT, Context())
    other = CONCEPT.model_copy(update={"name": "heart", "erase": ("heart",), "synonyms": ()})
    second = Uce().solve(model.with_edit(first), other, Context())
    alone = Uce().solve(model, other, Context())
    unit = torch.eye(128, dtype=torch.float64)
    for site in model.select("cross", "k"):
        first_map, second_map = (unit + edit.deltas[site].change(unit) for edit in (first, alone))
        expected = model.stored_weight(site).double() @ first_map @ second_map
        actual = model.with_edit(first).with_edit(second).weight(site)
        assert torch.allclose(actual, expected, atol=1e-9 * float(expected.norm()))
        assert not torch.allclose(
            actual, model.stored_weight(site).double() @ (first_map + second_map - unit), atol=1e-3
        )


@pytest.mark.parametrize("rows", ["tail", "last"])
def test_options_change_the_edit_as_they_say(model: Model, rows: str) -> None:
    stats = Uce(rows=rows).solve(model, CONCEPT, Context()).stats
    count = len(CONCEPT.prompts(CONCEPT.phrases))
    sums = Uce(rows=rows).solve(model, CONCEPT, Context()).sums["star"]
    assert (len(sums["context.source"]) == count) == (rows == "last")
    assert (len(sums["context.keep"]) == 1 + len(CONCEPT.prompts(CONCEPT.keep))) == (rows == "last")
    loose, tight = (Uce(rows=rows, keep=k).solve(model, CONCEPT, Context()).stats for k in (0.01, 100.0))
    assert tight["keep_drift"] < stats["keep_drift"] < loose["keep_drift"]
    assert tight["erased_residual"] > stats["erased_residual"] > loose["erased_residual"]


def test_rows_begin_at_the_phrase_and_not_at_the_end_of_its_template(model: Model) -> None:
    """In "a star on navy" it is "star" that is edited: its K and V become those of "circle" in the same position."""
    concept = CONCEPT.model_copy(update={"synonyms": (), "keep": (), "templates": ("a {} on navy",)})
    edit = Uce(rows="last", keep=0.0, ridge=1e-9).solve(model, concept, Context())
    star, circle = (model.encode([f"a {word} on navy"]).states[0].double() for word in ("star", "circle"))
    index = int(model.last_tokens(["a star"])[0])
    tokenizer = model._text_encoders.tokenizer("text_encoder")
    assert tokenizer.decode(tokenizer("a star on navy").input_ids[index]).strip() == "star"
    for site in model.select("cross", "kv"):
        before, after = model.stored_weight(site).double(), model.with_edit(edit).weight(site)
        goal = before @ circle[int(model.last_tokens(["a circle"])[0])]
        assert torch.allclose(after @ star[index], goal, atol=1e-4 * float(goal.norm()))
        assert not torch.allclose(before @ star[index], goal, atol=1e-2 * float(goal.norm()))


def test_no_anchor_maps_to_the_end_token_of_the_empty_prompt(model: Model) -> None:
    bare = Concept(name="star", erase=("star",), templates=("{}",))
    edit = Uce(rows="last", keep=0.0, ridge=1e-9).solve(model, bare, Context())
    star, empty = model.encode(["star"]).states[0, 1].double(), model.encode([""]).states[0].double()
    for site in model.select("cross", "v"):
        actual = model.with_edit(edit).weight(site) @ star
        goal, start_token = (model.stored_weight(site).double() @ empty[row] for row in (1, 0))
        assert torch.allclose(actual, goal, atol=1e-4 * float(goal.norm()))
        assert not torch.allclose(actual, start_token, atol=1e-2 * float(start_token.norm()))


def test_keep_weight_scales_the_solve_and_not_the_reported_drift(model: Model) -> None:
    none = Uce(keep=0.0).solve(model, CONCEPT, Context()).stats["keep_drift"]
    assert none > Uce().solve(model, CONCEPT, Context()).stats["keep_drift"] > 0


@pytest.mark.parametrize("options", [{"rows": "all"}, {"scale": 0.0}, {"keep": -1.0}])
def test_bad_options_are_errors(options: dict[str, object]) -> None:
    with pytest.raises(ErasecError, match="uce"):
        Uce(**options)  # type: ignore[arg-type]
