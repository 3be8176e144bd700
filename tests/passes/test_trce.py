"""TRCE stage 1 on a random-weights model: one map for all sites, its limits, and the end token's true place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec import model as models
from erasec.base import Context
from erasec.concept import Concept
from erasec.model import Model
from erasec.passes.trce import Remap
from erasec.rows import goals, spans

CONCEPT = Concept(
    name="star", erase=("star", "five-pointed spark"), anchor="circle", keep=("square", "ring"),
    templates=("{}", "a {}", "a photo of a {} at sunset/sunrise"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(random_folder: Path) -> Model:
    return models.load(str(random_folder))


def ends(model: Model, concept: Concept) -> tuple[torch.Tensor, torch.Tensor]:
    """States (n, d) of the first end token of every erased prompt and of its counterpart, from the token ids alone."""
    found = []
    for prompts in (concept.prompts(concept.phrases), goals(concept, concept.phrases)):
        texts = [prompt.text for prompt in prompts]
        ids = model._texts.ids(texts, "text_encoder")
        states = model.encode(texts).states
        found.append(states[torch.arange(len(texts)), ids.argmax(1)].double())
    return found[0], found[1]


def test_the_end_token_is_found_by_its_id_where_words_are_several_tokens(model: Model) -> None:
    """The reference takes the number of words plus one, which is another place as soon as a word splits."""
    prompts = CONCEPT.prompts(CONCEPT.phrases)
    found = spans(model, prompts, "context")[0].end
    ids = model._texts.ids([prompt.text for prompt in prompts], "text_encoder")
    assert found == ids.argmax(1).tolist()
    assert any(place != len(prompt.text.split()) + 1 for place, prompt in zip(found, prompts, strict=True))


def test_every_site_is_multiplied_by_one_matrix_the_papers(model: Model) -> None:
    """W' = [mean W s e^T + eta W C][mean e e^T + eta C]^-1 site by site, with lam = 0 as in the paper, C the prior."""
    source, target = ends(model, CONCEPT)
    eta = 0.02
    edit = Remap(ridge=1e-9, keep=eta).solve(model, CONCEPT, Context())
    kept = model.encode(["", *(prompt.text for prompt in CONCEPT.prompts(CONCEPT.keep))]).states.flatten(0, 1).double()
    gram = kept.T @ kept / len(kept)
    matrix = source.T @ source / len(source) + eta * gram
    matrix = matrix + 1e-9 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    for site in model.streams["context"]:
        weight = model.stored(site).double()
        left = weight @ (target.T @ source) / len(source) + weight @ (matrix - source.T @ source / len(source))
        wanted = left @ torch.linalg.inv(matrix)
        found = weight + edit.deltas[site].change(weight)
        assert float((found - wanted).norm() / (wanted - weight).norm()) < 1e-5
    assert len({id(delta) for delta in edit.deltas.values()}) == 1


def test_few_pairs_and_a_weak_prior_meet_their_targets_and_a_strong_prior_holds(model: Model) -> None:
    source, target = ends(model, CONCEPT)
    weak, strong = (Remap(keep=keep, ridge=1e-9).solve(model, CONCEPT, Context()) for keep in (1e-9, 1e9))
    for site in model.streams["context"]:
        weight = model.stored(site).double()
        wanted = weight @ target.T
        moved = (weight + weak.deltas[site].change(weight)) @ source.T
        assert float((moved - wanted).norm() / wanted.norm()) < 0.05
        assert float((weight @ source.T - wanted).norm() / wanted.norm()) > 0.05
        assert float(strong.deltas[site].change(weight).norm() / weight.norm()) < 1e-3


def test_rows_other_than_the_end_token_are_not_asked_for(model: Model) -> None:
    edit = Remap().solve(model, CONCEPT, Context())
    assert len(edit.sums["star"]["context.source"]) == len(CONCEPT.prompts(CONCEPT.phrases))
