"""Inversion without text: noise that the model paints as the picture again, of the energy of noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from erasec import registry
from erasec.audit.bench import TARGETS, Bench, Settings
from erasec.audit.null_text import NullText
from erasec.audit.subject import Subject, Untrained
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
    for group in ("name", "keep"):  # few are enough
        made.remember(("targets", group, TARGETS), partial(made.targets, group, 8))
    return made


def test_pictures_come_back_and_the_control_inverts_other_things(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    plain, energetic = NullText(refinements=2).attack(bench, subject)
    assert (plain.variant, energetic.variant) == ("fixed point", "fixed point and energy")
    pictures = subject.decode(bench.targets()[:2]).astype(int)
    assert abs(plain.pictures[:, 0] - pictures).mean() < 12
    assert plain.measured["error"] < 0.5
    other = next(NullText(refinements=1).control(bench, subject))
    assert abs(other.pictures[:, 0] - pictures).mean() > 20
    assert all(weight.grad is None for weight in subject.denoiser.unet.parameters())


def test_refinement_lowers_the_residual(bench: Bench) -> None:
    pictures = bench.targets()[:2]
    residuals = [NullText(refinements=count).invert(bench, bench.base, pictures, 0.0)[1] for count in (1, 5)]
    assert residuals[1] < 0.9 * residuals[0]


def test_the_energy_of_an_untrained_models_noise_is_held(bench: Bench) -> None:
    untrained = Untrained("random", bench.base.model, Context())
    pictures = bench.targets()[:2]
    free, _ = NullText(refinements=5, lr=0.1).invert(bench, untrained, pictures, 0.0)
    held, _ = NullText(refinements=5, lr=0.1).invert(bench, untrained, pictures, 1.0)
    norms = [float(noise.pow(2).mean().sqrt()) for noise in (free, held)]
    assert norms[0] < norms[1]
    assert abs(norms[1] - 1) < 0.25
    assert torch.isfinite(held).all()
