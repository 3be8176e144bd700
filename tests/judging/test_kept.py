"""What is kept: the unedited model and a good edit pass, and noise in one self-attention matrix fails every measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from erasec.attention.pipeline import Sampling, generate
from erasec.base import Check, Context
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge, prompt
from erasec.judging import kept, perceptual
from erasec.judging.kept import Pictures, kept_checks, not_measured
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe import concept
from erasec.recipe.recipe import Limits

COUNT = 48
OTHERS = [shape for shape in world.SHAPES if shape != "star"]
PROMPTS = [prompt(OTHERS[index % 9], index // 9 + index) for index in range(COUNT)]
LIMITS = Limits(cmmd=0.15, kid=0.06)
NOISY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v.weight"


def painted(folder: Path, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return generate(folder, PROMPTS, range(seed, seed + COUNT), Sampling(4, 4.0), "pictures")


def pictures(before: np.ndarray, after: np.ndarray, group: str = "kept") -> Pictures:  # type: ignore[type-arg]
    judge = GlyphJudge()
    return Pictures(group, before, after, (judge.agreement(before, PROMPTS), judge.agreement(after, PROMPTS)))


@pytest.fixture(scope="module")
def model() -> Model:
    return loading.load("glyphs")


@pytest.fixture(scope="module")
def before(model: Model) -> np.ndarray:  # type: ignore[type-arg]
    return painted(model.source.root)


@pytest.fixture(scope="module")
def after(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Edit], np.ndarray]:  # type: ignore[type-arg]
    def after(edit: Edit) -> np.ndarray:  # type: ignore[type-arg]
        edited, folder = model.with_edit(edit), tmp_path_factory.mktemp("edited") / "hf"
        edited.source.write(folder, edited.merged(), True)
        return painted(folder)

    return after


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distances are measured on few pictures, to save time."""
    monkeypatch.setattr(kept, "LEAST", COUNT)


def checks(shown: Pictures, limits: Limits = LIMITS) -> dict[str, Check]:
    return {check.name.split("/")[1]: check for check in kept_checks(shown, GlyphJudge(), limits, "4 DDIM steps")}


@pytest.fixture(scope="module")
def noisy(model: Model, before: np.ndarray, after: Callable[[Edit], np.ndarray]) -> Pictures:  # type: ignore[type-arg]
    """The pictures before and after noise in one attn1 matrix: the values of its first level."""
    (site,) = (site for site in model.sites if site.key == NOISY)
    weight = model.weight(site)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    return pictures(before, after(Edit({site: Dense(8 * weight.std() * noise)}, "noise", ("star",), "")))


def test_the_unedited_model_loses_nothing(before: np.ndarray) -> None:  # type: ignore[type-arg]
    found = checks(pictures(before, before), Limits(agreement=0, drift=0, cmmd=1e-9, kid=1e-9))
    assert found.keys() == {"agreement", "drift", "cmmd", "kid"}
    assert all(check.passed and check.limit is not None for check in found.values())
    assert found["agreement"].value == found["drift"].value == 0


def test_noise_in_one_attn1_matrix_fails_every_measure(noisy: Pictures) -> None:
    found = checks(noisy)
    assert {name for name, check in found.items() if check.passed} == set(), {n: c.value for n, c in found.items()}
    captions = checks(replace(noisy, group="captions"))
    assert not captions["agreement"].passed and captions["agreement"].limit == Limits().captions
    assert captions["drift"].outcome == "reported"


def test_a_good_edit_passes_them(
    model: Model,
    before: np.ndarray,  # type: ignore[type-arg]
    after: Callable[[Edit], np.ndarray],  # type: ignore[type-arg]
) -> None:
    found = checks(pictures(before, after(Uce().solve(model, concept.find("star", "glyphs"), Context()))))
    assert all(check.passed for check in found.values()), {name: check.value for name, check in found.items()}


def test_distances_are_reported_without_a_limit_and_say_what_chance_does(noisy: Pictures) -> None:
    found = checks(noisy, Limits())
    assert found["cmmd"].outcome == found["kid"].outcome == "reported"
    assert found["cmmd"].how.startswith("CMMD of embeddings by glyphs judge B, ")
    assert "with 95 % interval, 48 pairs; two halves of the pictures before are" in found["cmmd"].how
    assert all(check.how.endswith("; 4 DDIM steps") for check in found.values())


def test_without_a_judge_only_the_pictures_are_compared(noisy: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "unavailable", lambda: "no lpips: pip install it")
    shown = replace(noisy, agreement=None)
    (drift,) = kept_checks(shown, None, Limits(), "")
    assert drift.name == "kept/drift" and not drift.passed and drift.value == checks(noisy)["drift"].value
    assert not_measured(None) == (
        "LPIPS, the perceptual distance of pictures before and after, was not measured: no lpips: pip install it.",
    )
    assert not_measured(GlyphJudge()) == ()  # whose world has no photographs


class Blind(GlyphJudge):
    """Embeds nothing."""

    def embed(self, images: object) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("limit", ["cmmd", "kid", "lpips"])
def test_a_limit_on_what_cannot_be_measured_fails(noisy: Pictures, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(perceptual, "unavailable", lambda: "no lpips")
    for judge in (None, Blind()):
        found = {check.name: check for check in kept_checks(noisy, judge, Limits(**{limit: 1e9}), "")}
        assert math.isnan(found[f"kept/{limit}"].value) and not found[f"kept/{limit}"].passed
        assert found[f"kept/{limit}"].how.startswith("not measured: ")
        assert {f"kept/{name}" for name in {"cmmd", "kid", "lpips"} - {limit}}.isdisjoint(found)


def test_few_pictures_have_no_distances(noisy: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LEAST", COUNT + 1)
    assert checks(noisy).keys() == {"agreement", "drift"}


def test_lpips_is_the_mean_of_pairs_and_has_its_limit(noisy: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, whose distance is that of pixels."""
    asked = []

    def distances(a: np.ndarray, b: np.ndarray, device: str) -> np.ndarray:  # type: ignore[type-arg]
        asked.append(device)
        return np.abs(a.astype(float) - b).mean((1, 2, 3)) / 255

    monkeypatch.setattr(perceptual, "unavailable", lambda: "")
    monkeypatch.setattr(perceptual, "distances", distances)
    reported = checks(replace(noisy, device="cuda:1"), Limits(lpips=0.5))["lpips"]
    assert reported.value == pytest.approx(checks(noisy)["drift"].value) and reported.passed
    assert asked == ["cuda:1"] and "48 pairs" in reported.how
    assert not checks(noisy, Limits(lpips=0.01))["lpips"].passed
    assert "lpips" not in checks(noisy, Limits())  # a synthetic world, no photographs
