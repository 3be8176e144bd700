"""Probes that begin in the middle of sampling: what they begin with, what they cover, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from erasec.audit.bench import Bench, Settings
from erasec.audit.latents import Completion, Inpainting, Noised, crop, middle
from erasec.audit.subject import Subject
from erasec.base import Context, Judge, Question
from erasec.model.loading import load
from erasec.recipe.concept import Concept


class Anything(Judge):
    """Sees the concept in every picture."""

    name: ClassVar[str] = "anything"
    summary: ClassVar[str] = "every picture"
    digest: ClassVar[str] = "anything"  # type: ignore[assignment]

    @classmethod
    def for_model(cls, model: Any, tuning: bool = False) -> None:
        return None

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        names = [Question("name", f"a star {number}", number, "star") for number in range(images)]
        return (*names, *(Question("keep", f"a circle {number}", number, "circle") for number in range(images)))

    def sees(self, images: Any, labels: Any) -> Any:
        return np.ones(len(images), bool)

    def agreement(self, images: Any, prompts: Any) -> None:
        return None


@pytest.fixture(scope="module")
def bench(random_folder: Path) -> Bench:
    model = load(str(random_folder))
    subjects: Any = {role: Subject(role, model, Context()) for role in ("model", "base")}
    concept = Concept(name="star", erase=("star",))
    return Bench(concept, subjects, Anything(), Anything(), Settings(images=3, steps=5, guidance=2.0))


def test_when_the_base_takes_all_steps_but_none_the_model_paints_the_prompt_itself(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    prompts = bench.prompts("name")
    noise = subject.noise(bench.seeds("completion", len(prompts)))
    plain = subject.decode(bench.paint(subject, subject.states(prompts), noise, "plain"))
    # Model and base are the same here, so that every completion is the base's own picture.
    for attempt in Completion().attack(bench, subject):
        assert np.abs(attempt.pictures[:, 0].astype(int) - plain).max() <= 1
    (first, _) = Completion(first=20, second=60).control(bench, subject)
    assert np.abs(first.pictures[:, 0].astype(int) - plain).max() > 5  # begun with prompts of other things


def test_steps_of_the_base_are_the_variants(bench: Bench) -> None:
    attempts = list(Completion(first=20, second=60).attack(bench, bench.subjects["model"]))  # type: ignore[arg-type]
    assert [attempt.variant for attempt in attempts] == ["after 1 of 5 steps", "after 3 of 5 steps"]


def test_little_noise_leaves_the_picture_and_much_does_not(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    started = subject.decode(bench.targets("name")[:3]).astype(int)

    def distance(at: float) -> float:
        empty, _ = Noised(at=at).attack(bench, subject)
        return float(np.abs(empty.pictures[:, 0] - started).mean())

    assert distance(0.1) < distance(0.95)


def test_inpainting_keeps_the_surroundings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Any = bench.subjects["model"]
    painted: list[torch.Tensor] = []
    stock = subject.decode
    monkeypatch.setattr(subject, "decode", lambda latents: painted.append(latents) or stock(latents))
    attempts = list(Inpainting().attack(bench, subject))
    around = bench.targets("name")[:3]
    for latents, share in zip(painted, (0.25, 0.5), strict=True):
        top, left, bottom, right = middle(around.shape[2], around.shape[3], share)
        inside = torch.zeros(around.shape[2:], dtype=torch.bool)
        inside[top:bottom, left:right] = True
        # The last step noises what is known to the level of the last alpha, which is almost none.
        assert float((latents - around)[:, :, ~inside].abs().mean()) < 0.1
        assert float((latents - around)[:, :, inside].abs().mean()) > 0.2
    assert [attempt.variant for attempt in attempts] == ["mask of 25%", "mask of 50%"]


def test_a_mask_covers_its_share() -> None:
    for share in (0.25, 0.5):
        top, left, bottom, right = middle(64, 64, share)
        assert (bottom - top) * (right - left) / 64**2 == pytest.approx(share, abs=0.02)
        assert abs(top - (64 - bottom)) <= 1
        assert abs(left - (64 - right)) <= 1


def test_only_the_crop_is_judged() -> None:
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    picture[:, 2:6, 2:6] = 200
    assert (crop(picture, (2, 2, 6, 6)) == 200).all()
    assert crop(picture, (2, 2, 6, 6)).shape == picture.shape
