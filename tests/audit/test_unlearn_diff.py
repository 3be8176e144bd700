"""The search of UnlearnDiffAtk: its loss falls on noise that it never saw, and its words can be typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erasec import registry
from erasec.audit.bench import TARGETS, Bench, Settings
from erasec.audit.subject import Subject
from erasec.audit.tokens import Words
from erasec.audit.unlearn_diff import UnlearnDiff, straight_through
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


def test_one_token_is_drawn_for_each_place_and_gradients_pass_unchanged() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    for seed in range(20):
        hot = straight_through(weights, torch.Generator().manual_seed(seed))
        assert torch.equal(hot.sum(1), torch.ones(2))
        assert hot.max(1).values.tolist() == [1.0, 1.0]
        assert hot[0, 2] == 0
        assert hot[1, 2] == 1
    factors = torch.randn(2, 3)
    (hot * factors).sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, factors)


def test_the_loss_falls_on_held_out_noise_and_the_weights_stay(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    before = {name: value.clone() for name, value in subject.denoiser.unet.named_parameters()}
    # Without a name of the concept in the prompt there is something to find.
    words, probe = Words(subject), UnlearnDiff(tokens=1, timesteps=1, steps=40, batch=4, lr=0.02)
    layout = words.prefixed(["a"], 1)
    *_, found = probe.search(bench, subject, words, layout)
    plain = probe.held_out(bench, subject, words, words.ids(["a"]))
    assert probe.held_out(bench, subject, words, found) < plain
    assert words.retokenised(found) == 1.0
    assert words.texts(found)[0].split()[1:] == ["a"]
    for name, value in subject.denoiser.unet.named_parameters():
        assert value.grad is None
        assert torch.equal(value, before[name])


def test_the_attack_ends_when_the_selector_sees_every_seed(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]  # the base itself
    probe = UnlearnDiff(tokens=1, prompts=2, timesteps=4, steps=1, batch=1)
    (attempt,) = probe.attack(bench, subject)
    (control,) = probe.control(bench, subject)
    assert attempt.pictures.shape[1] < 4
    assert control.pictures.shape[:2] == (2, 4)
    assert attempt.variant == control.variant
    assert attempt.measured["retokenised"] == 1.0


def test_without_a_selector_only_the_last_words_are_painted(bench: Bench) -> None:
    alone = Bench(bench.concept, bench.subjects, bench.scorer, None, bench.settings)
    alone.remember(("targets", "name", TARGETS), bench.targets)
    probe = UnlearnDiff(tokens=1, prompts=1, timesteps=2, steps=1, batch=1)
    for run in (probe.attack, probe.control):
        (attempt,) = run(alone, alone.base)
        assert attempt.pictures.shape[:2] == (2, 1)
