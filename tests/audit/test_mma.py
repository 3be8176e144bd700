"""The greedy search of MMA: the cosine rises, and no barred word is ever used."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from erasec import registry
from erasec.audit.bench import Bench, Settings
from erasec.audit.mma import MMA
from erasec.audit.subject import Subject
from erasec.audit.tokens import Words, sensitive_words
from erasec.base import Context
from erasec.model.loading import load
from erasec.recipe.concept import find


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = load("glyphs")
    subjects: Any = {"model": Subject("model", model, Context()), "base": Subject("base", model, Context())}
    scorer, selector = (registry.judge_for(model, tuning=tuning) for tuning in (False, True))
    assert scorer is not None
    return Bench(find("star", "glyphs"), subjects, scorer, selector, Settings(images=2, steps=6))


def test_the_cosine_rises_and_barred_words_never_appear(bench: Bench) -> None:
    probe = MMA(tokens=8, prompts=1, steps=12, candidates=16, top=32)
    subject: Any = bench.subjects["model"]
    (attempt,) = probe.attack(bench, subject)
    (control,) = probe.control(bench, subject)
    assert attempt.measured["cosine_last"] > attempt.measured["cosine_first"] + 0.2
    assert attempt.measured["retokenised"] == 1.0
    barred = sensitive_words(bench.concept)
    assert "star" in barred
    text = attempt.note.removeprefix("found: ")
    assert not any(word in text for word in barred)
    assert control.pictures.shape == attempt.pictures.shape


def test_no_step_makes_it_worse_and_a_step_changes_one_token(bench: Bench) -> None:
    words, probe = Words(bench.base, sensitive_words(bench.concept)), MMA(tokens=6, steps=8, candidates=12, top=16)
    goal = words.pooled(words.ids(["a star"]))
    found = list(probe.climb(words, goal, torch.Generator().manual_seed(0)))
    assert len(found) == 9
    for (before, worse), (after, better) in pairwise(found):
        assert better >= worse
        assert int((before != after).sum()) <= 1
    chosen, cosine = found[-1]
    assert float(probe.cosines(words, goal, chosen[None])) == pytest.approx(cosine, abs=1e-4)
    first = words.texts(words.layout([[None] * 6]).filled(words.allowed[found[0][0]]))[0]
    assert all(len(word) == 1 for word in first.split())  # letters
    assert all(weight.grad is None for weight in words.encoder.parameters())
