"""MACE on a model with random weights: refinement and fusion against sums over states at every site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec.base import Context
from erasec.closed_form import priors
from erasec.closed_form.token_rows import goal_prompts, row_pairs
from erasec.commands.combine import combine
from erasec.errors import ErasecError
from erasec.model import edit_file, loading
from erasec.model.edit import Edit, LowRank
from erasec.model.view import Model
from erasec.passes.eiup import Eiup
from erasec.passes.mace import Mace
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

STAR = Concept(
    name="star", erase=("five-pointed spark",), anchor="circle", keep=("square",), templates=("{}", "red {} on gray")
)
HEART = Concept(name="heart", erase=("heart",), anchor="ring", keep=("box",), templates=("{}", "a blue {}"))


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return loading.load(str(random_folder))


def rows(model: Model, concept: Concept, selector: str) -> tuple[Tensor, Tensor]:
    pairs = row_pairs(
        model, concept.prompts(concept.phrases), goal_prompts(concept, concept.phrases), selector, "context"
    )
    return pairs[0].double(), pairs[1].double()


def kept_states(model: Model, concept: Concept) -> Tensor:
    texts = ["", *(prompt.text for prompt in concept.prompts(concept.keep))]
    states = model.encode(texts).states.flatten(0, 1).double()
    return states / len(states) ** 0.5


def naive(weight: Tensor, source: Tensor, target: Tensor, keep: Tensor, ridge: float) -> Tensor:
    gram = source.T @ source + keep.T @ keep
    lam = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = weight @ lam + (weight @ target.T) @ source + (weight @ keep.T) @ keep
    return left @ torch.linalg.inv(gram + lam)


def test_each_token_is_one_of_the_phrases_own_or_in_the_context(model: Model) -> None:
    """Together they are every token once, and the phrase's own tokens are only in "words"."""
    prompts = STAR.prompts(STAR.phrases)
    ids = model._text_encoders.ids([prompt.text for prompt in prompts], "text_encoder")
    own = [model._text_encoders.ids([phrase], "text_encoder")[0] for phrase in STAR.phrases]
    count = int((own[0] == ids.max()).int().argmax()) - 1
    words, _ = rows(model, STAR, "words")
    context, _ = rows(model, STAR, "context")
    assert len(words) == count * len(prompts) > len(prompts)
    trimmed = (count - 1) * len(prompts)  # the anchor is one token, so further tokens of the longer phrase are cut
    assert len(words) + len(context) == 77 * len(prompts)
    assert trimmed > 0
    states = model.encode([prompts[1].text]).states[0].double()
    index = int(model.last_tokens([prompts[1].before])[0]) + 1
    assert any(torch.equal(states[index], row) for row in words)
    assert not any(torch.equal(states[index], row) for row in context)


def test_refinement_alone_is_the_naive_edit_of_the_words_around(model: Model) -> None:
    edit = Mace(own=0.0, ridge=0.05).solve(model, STAR, Context())
    source, target = (side / len(rows(model, STAR, "context")[0]) ** 0.5 for side in rows(model, STAR, "context"))
    for site in model.streams["context"]:
        weight = model.stored_weight(site).double()
        expected = naive(weight, source, target, kept_states(model, STAR), 0.05)
        actual = weight + edit.deltas[site].change(weight)
        assert float((actual - expected).norm() / (expected - weight).norm()) < 1e-6


def test_two_concepts_are_refined_together_and_their_own_edits_fused(model: Model) -> None:
    """Equation 8 at every site, W refined: least squares of (W' - W_i) states_i, of (W' - W) kept and of W' - W."""
    ridge, concepts = 0.05, (STAR, HEART)
    edit = next(Mace(ridge=ridge).solve_all(model, concepts, Context()))
    refined = next(Mace(ridge=ridge, own=0.0).solve_all(model, concepts, Context()))
    keep = torch.cat([kept_states(model, concept) for concept in (HEART, STAR)])
    for site in model.streams["context"][:6]:
        weight = model.stored_weight(site).double()
        weight = weight + refined.deltas[site].change(weight)
        left, gram = weight @ keep.T @ keep, keep.T @ keep
        for concept in concepts:
            source, target = rows(model, concept, "words")
            scale = len(source) ** 0.5
            own = naive(weight, source / scale, target / scale, keep, ridge)
            all_states = model.encode([prompt.text for prompt in concept.prompts(concept.phrases)]).states.flatten(0, 1)
            states = all_states.double() / len(all_states) ** 0.5
            left, gram = left + own @ states.T @ states, gram + states.T @ states
        lam = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        expected = (left + weight @ lam) @ torch.linalg.inv(gram + lam)
        actual = model.stored_weight(site).double() + edit.deltas[site].change(model.stored_weight(site))
        assert float((actual - expected).norm() / (expected - weight).norm()) < 1e-6


@pytest.mark.parametrize("captions", [(), ("a photo of an arrow", "a big box")])
def test_given_edits_are_fused_as_the_paper_does(model: Model, tmp_path: Path, captions: tuple[str, ...]) -> None:
    """Equation 8 with B_i A_i from files: a low-rank one at two sites, and a closed-form one at all; P with a prior."""
    draw = torch.Generator().manual_seed(0)
    sites = model.streams["context"]
    some = {
        site: LowRank(*(torch.randn(*shape, generator=draw).double() / 10 for shape in ((site.shape[0], 2), (2, 128))))
        for site in sites[:2]
    }
    edits = {"star": Edit(some, "mine", ("star",), model.digest), "heart": Uce().solve(model, HEART, Context())}
    for name, edit in edits.items():
        edit_file.write_edits(tmp_path / name, [edit], model.with_edit(edit).base_record())
    step = Mace(ridge=0.05, edits=f"{tmp_path / 'star'}; {tmp_path / 'heart'}")
    if captions:
        (tmp_path / "captions.txt").write_text("\n".join(captions))
        priors.write(tmp_path / "prior", model, tmp_path / "captions.txt")
        step = replace(step, prior=str(tmp_path / "prior"), prior_weight=3.0)
    refined, fused = step.solve_all(model, (STAR, HEART), Context())
    edited = model.with_edit(refined)
    keep = torch.cat([kept_states(model, concept) for concept in (STAR, HEART)])
    if captions:
        crowd = model.encode(captions).states.flatten(0, 1).double()
        keep = torch.cat([keep, crowd * (3.0 / len(crowd)) ** 0.5])
    for site in sites[:4]:
        weight = edited.weight(site)
        left, gram = weight @ keep.T @ keep, keep.T @ keep
        for concept in (STAR, HEART):
            all_states = model.encode([prompt.text for prompt in concept.prompts(concept.phrases)]).states.flatten(0, 1)
            states = all_states.double() / len(all_states) ** 0.5
            delta = edits[concept.name].deltas.get(site)
            own = weight + delta.change(weight) if delta else weight
            left, gram = left + own @ states.T @ states, gram + states.T @ states
        lam = 0.05 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        expected = (left + weight @ lam) @ torch.linalg.inv(gram + lam)
        actual = weight + fused.deltas[site].change(weight)
        assert float((actual - expected).norm() / (expected - weight).norm()) < 1e-6
    assert fused.concepts == ("heart", "star")
    assert list(refined.deltas) and model.with_edit(refined).with_edit(fused).merged()


def test_files_that_are_not_for_these_concepts_are_errors(model: Model, tmp_path: Path) -> None:
    star = Uce().solve(model, STAR, Context())
    edit_file.write_edits(tmp_path / "star", [star], model.with_edit(star).base_record())
    site = model.select("self", "q")[0]
    strange = Edit(
        {site: LowRank(torch.zeros(site.shape[0], 1), torch.zeros(1, site.shape[1]))}, "mine", ("heart",), ""
    )
    edit_file.write_edits(tmp_path / "self", [strange], model.with_edit(strange).base_record())
    other = Edit({}, "mine", ("heart",), "0" * 64)
    edit_file.write_edits(tmp_path / "other", [other], model.base_record())
    tries = {
        "erase star": ["star"],
        "erase star, star": ["star", "star"],
        "changes": ["star", "self"],
        "another model": ["star", "other"],
        "there is no edit file": ["star", "none"],
    }
    for words, names in tries.items():
        step = Mace(edits=";".join(str(tmp_path / name) for name in names))
        with pytest.raises(ErasecError, match=words):
            list(step.solve_all(model, (STAR, HEART), Context()))


def test_a_given_edit_that_leads_to_another_concept_is_an_error(model: Model, tmp_path: Path) -> None:
    to_heart = STAR.model_copy(update={"anchor": "a heart"})
    for item in (to_heart, HEART):
        edit = Uce().solve(model, item, Context())
        edit_file.write_edits(tmp_path / item.name, [edit], model.with_edit(edit).base_record())
    step = Mace(edits=f"{tmp_path / 'star'};{tmp_path / 'heart'}")
    with pytest.raises(ErasecError, match="the given edit of star makes it 'a heart', which is erased too"):
        list(step.solve_all(model, (STAR, HEART), Context()))


def test_a_given_edit_that_changes_no_weight_is_an_error(model: Model, tmp_path: Path) -> None:
    """The refinement and the other concept move tensors, so nothing else would say it."""
    star = Uce().solve(model, STAR, Context())
    edit_file.write_edits(tmp_path / "star", [star], model.with_edit(star).base_record())
    for words, edit in (
        ("has a memory", Eiup().solve(model, HEART, Context())),
        ("changes no weight", Edit({}, "mine", ("heart",), model.digest)),
    ):
        edit_file.write_edits(tmp_path / "heart", [edit], model.base_record())
        step = Mace(edits=f"{tmp_path / 'star'};{tmp_path / 'heart'}")
        with pytest.raises(ErasecError, match=words):
            list(step.solve_all(model, (STAR, HEART), Context()))


def test_a_given_edit_without_goals_is_said(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing knows what such an edit leads to, so nothing may look as if that had been compared."""
    for item in (STAR, HEART):
        edit = Uce().solve(model, item, Context())
        if item is HEART:
            edit = replace(edit, phrases={"heart": {"erase": ["heart"], "keep": []}})
        edit_file.write_edits(tmp_path / item.name, [edit], model.with_edit(edit).base_record())
    list(Mace(edits=f"{tmp_path / 'star'};{tmp_path / 'heart'}").solve_all(model, (STAR, HEART), Context()))
    said = capsys.readouterr().err
    assert "the edit of heart does not say what heart becomes" in said and "edit of star" not in said
    combine([tmp_path / "star", tmp_path / "heart"], [], tmp_path / "both")
    assert "the edit of heart does not say what heart becomes" in capsys.readouterr().err


def test_bad_options_are_errors() -> None:
    with pytest.raises(ErasecError, match="mace"):
        Mace(own=-1.0)
