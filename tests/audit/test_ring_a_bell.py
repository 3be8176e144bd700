"""The genetic search of Ring-A-Bell, and the difference that a concept makes to text states."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from erasec import registry
from erasec.audit.bench import Bench, Settings
from erasec.audit.ring_a_bell import ConceptVector, RingABell, concept_direction, concept_pairs
from erasec.audit.subject import Subject
from erasec.audit.tokens import Words
from erasec.base import Context
from erasec.model.loading import load
from erasec.recipe.concept import Concept, find


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = load("glyphs")
    subjects: Any = {"model": Subject("model", model, Context()), "base": Subject("base", model, Context())}
    scorer, selector = (registry.judge_for(model, tuning=tuning) for tuning in (False, True))
    assert scorer is not None
    return Bench(find("star", "glyphs"), subjects, scorer, selector, Settings(images=2, steps=6))


def test_pairs_differ_in_the_concept_alone() -> None:
    concept = Concept(name="star", erase=("star",), keep=("ring", "arrow"), templates=("a {} on navy", "{}"))
    assert concept_pairs(concept) == [("a star on navy", "a ring on navy"), ("star", "arrow")]
    assert concept_pairs(concept, 1) == [("a star on navy", "a ring on navy")]
    anchored = Concept(name="star", erase=("star",), anchor="owl", templates=("a {}",))
    assert concept_pairs(anchored) == [("a star", "an owl")]
    bare = Concept(name="star", erase=("star",), templates=("{} here",))
    assert concept_pairs(bare) == [("star here", "here")]


def test_the_search_never_gets_worse_beats_random_words_and_can_be_typed(bench: Bench) -> None:
    words, probe = Words(bench.base), RingABell(tokens=6, population=12, generations=15)
    goal = bench.base.states(["a red star"])[0] + concept_direction(bench.base, bench.concept)
    found = list(probe.evolve(words, goal, torch.Generator().manual_seed(0)))
    fitness = [value for _, value in found]
    assert all(after <= before for before, after in pairwise(fitness))
    drawn = torch.randint(len(words.allowed), (12 + 15 * 6, 6), generator=torch.Generator().manual_seed(1))
    assert fitness[-1] < float(probe.fitness(words, goal, drawn).min())  # as many random texts
    best = found[-1][0]
    assert float(probe.fitness(words, goal, best[None])) == pytest.approx(fitness[-1], rel=1e-4)


def test_all_subjects_paint_the_same_words(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    for subject in bench.subjects.values():

        def pictures(prompts: list[str], *rest: Any) -> Any:
            asked.append(prompts)
            return np.zeros((len(prompts), 2, 2, 3), np.uint8)

        monkeypatch.setattr(subject, "pictures", pictures)
    probe = RingABell(tokens=4, prompts=2, population=4, generations=2)
    attempts = [next(probe.attack(bench, subject)) for subject in bench.subjects.values()]
    assert asked[0] == asked[1]
    assert attempts[0].measured["fitness_last"] <= attempts[0].measured["fitness_first"]
    assert attempts[0].measured["retokenised"] == 1.0
    (control,) = probe.control(bench, bench.base)
    assert control.pictures.shape == attempts[0].pictures.shape
    assert asked[2] != asked[0]
    assert len(set(asked[2])) == 2


def test_the_difference_points_from_other_things_to_the_concept(bench: Bench) -> None:
    direction = concept_direction(bench.base, bench.concept)
    star, circle, red = bench.base.states(["a red star", "a red circle", "a blue circle"])
    toward = cosine_similarity(direction.flatten(), (star - circle).flatten(), 0)
    assert float(toward) > 0.3
    assert float(toward) > 2 * abs(float(cosine_similarity(direction.flatten(), (red - circle).flatten(), 0)))


def test_the_control_is_a_direction_of_the_same_length(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    stock = bench.paint
    monkeypatch.setattr(
        bench, "paint", lambda subject, states, *rest: given.append(states) or stock(subject, states, *rest)
    )
    subject: Any = bench.subjects["model"]
    for run in (ConceptVector(eta=2.0).attack, ConceptVector(eta=2.0).control):
        (attempt,) = run(bench, subject)
        assert attempt.variant == "eta 2"
    added = [states - subject.states(bench.prompts("name")) for states in given]
    assert torch.allclose(added[0].norm(dim=2), added[1].norm(dim=2), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(added[0], added[1], atol=0.1)
