"""The search of P4D: words for which one model predicts what another does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasec import registry
from erasec.audit.bench import TARGETS, Bench, Settings
from erasec.audit.p4d import P4D, nearest
from erasec.audit.subject import Subject
from erasec.audit.tokens import Words
from erasec.base import Context
from erasec.model.loading import load
from erasec.recipe.concept import find


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = load("glyphs")
    subjects: Any = {"model": Subject("model", model, Context()), "base": Subject("base", model, Context())}
    scorer, selector = (registry.judge_for(model, tuning=tuning) for tuning in (False, True))
    assert scorer is not None
    made = Bench(find("star", "glyphs"), subjects, scorer, selector, Settings(images=2, steps=6))
    made.remember(("targets", "name", TARGETS), lambda: made.targets("name", 8))  # few are enough
    return made


def test_the_nearest_row_is_that_of_the_largest_cosine() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert nearest(torch.tensor([[9.0, 1.0], [0.1, 0.2], [0.0, 0.01]]), table).tolist() == [0, 2, 1]


def test_the_loss_falls_and_neither_model_changes(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    words, losses = Words(subject), []  # type: ignore[var-annotated]
    probe = P4D(tokens=3, steps=24, every_step=24, batch=4)
    layout = words.layout([[None] * 3])
    (found,) = probe.search(bench, subject, words, layout, ["a star"], losses)
    assert sum(losses[-6:]) < sum(losses[:6])
    assert words.retokenised(found) == 1.0
    for network in (subject.denoiser.unet, bench.base.denoiser.unet, words.encoder):
        assert all(weight.grad is None for weight in network.parameters())


def test_with_mode_k_the_prompts_own_words_stay(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    probe = P4D(mode="k", every=2, prompts=2, steps=2, every_step=1, batch=1)
    (attempt,) = probe.attack(bench, subject)
    (control,) = probe.control(bench, subject)
    assert control.pictures.shape[:2] == (2, 2)
    assert attempt.variant == control.variant == "a token behind every 2, 2 steps"
    words, prompts = Words(subject), bench.prompts("name", 2)
    for found in probe.search(bench, subject, words, words.interleaved(prompts, 2), prompts, []):
        for text, prompt in zip(words.texts(found), prompts, strict=True):
            rest = iter(text.split())
            assert all(word in rest for word in prompt.split())  # in their order
            assert len(text.split()) > len(prompt.split())


def test_with_mode_n_nothing_of_the_prompt_stays(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    (attempt,) = P4D(tokens=5, prompts=2, steps=1, every_step=1, batch=1).attack(bench, subject)
    assert len(attempt.note.removeprefix("found: ").split()) == 5
