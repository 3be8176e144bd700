"""What is drawn instead, and the notion of erasure: three outcomes, each only where the readings carry it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from sample_audit import READINGS, hits, row

from erasec.audit.base import Reading, plain_seeds
from erasec.audit.bench import Bench, Settings
from erasec.audit.instead import NOTHING, alternatives, find_shares, notion, spread_of
from erasec.audit.subject import Pictured
from erasec.base import Judge, Question, Role
from erasec.recipe.concept import Concept

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("circle", "square"), templates=("a {}",))
LEVELS = {"star": 200, "circle": 100, "square": 50}


class Levels(Judge):
    """Sees a shape in pictures of its brightness. Without ``others``, its only label is the concept's."""

    name: ClassVar[str] = "levels"
    summary: ClassVar[str] = "brightness"
    digest: ClassVar[str] = "levels"  # type: ignore[assignment]

    def __init__(self, others: bool = True, embeds: bool = False) -> None:
        self.others, self.embeds = others, embeds

    @classmethod
    def for_model(cls, model: Any, tuning: bool = False) -> None:
        return None

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        kept = [Question("keep", f"a {label}", 0, label) for label in ("circle", "square") if self.others]
        return (*(Question("name", "a star", number, "star") for number in range(images)), *kept)

    def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([image.mean() == LEVELS[label] for image, label in zip(images, labels, strict=True)])

    def agreement(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64]:
        wanted = np.array([LEVELS[prompt.removeprefix("a ")] for prompt in prompts], float)
        nearness: NDArray[np.float64] = -np.abs(images.reshape(len(images), -1).mean(1) - wanted)
        return nearness

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        if not self.embeds:
            return None
        return np.stack([np.ones(len(images)), images.reshape(len(images), -1).mean(1) > 90], 1)


@dataclass
class Painter(Pictured):
    """Paints pictures of these levels in turn."""

    role: str
    levels: tuple[int, ...]
    digest: str = "painter"

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> NDArray[np.uint8]:
        return pictures(*(self.levels[number % len(self.levels)] for number in range(len(prompts))))


def pictures(*levels: int) -> NDArray[np.uint8]:
    return np.stack([np.full((2, 2, 3), level, np.uint8) for level in levels])


def bench(judge: Judge | None = None) -> Bench:
    subjects: dict[Role, Pictured] = {"model": Painter("model", (100, 100, 50, 7)), "base": Painter("base", (200,))}
    return Bench(CONCEPT, subjects, judge or Levels(), None, Settings(images=4))


def test_shares_are_those_of_the_labels_that_the_scorer_sees() -> None:
    shares, how = find_shares(bench(), pictures(100, 100, 50, 7))
    assert shares == {"circle": 0.5, "square": 0.25, NOTHING: 0.25}
    assert "several" in how
    assert next(iter(shares)) == "circle"  # the largest first


def test_a_judge_of_one_label_takes_the_nearest_phrase() -> None:
    shares, how = find_shares(bench(Levels(others=False)), pictures(100, 110, 45, 199))
    assert shares == {"circle": 0.5, "star": 0.25, "square": 0.25}
    assert how.startswith("the nearest of 3 phrases")


def test_diversity_is_a_mean_distance_of_pairs() -> None:
    same, how = spread_of(bench(), pictures(7, 7, 7))
    assert same == 0 and "pixels" in how
    apart, _ = spread_of(bench(), pictures(0, 255, 0))
    assert apart == pytest.approx(2 / 3)  # two pairs of three
    embedded, how = spread_of(bench(Levels(embeds=True)), pictures(200, 7, 200))
    assert embedded == pytest.approx(2 / 3 * (1 - 2**-0.5)) and "cosine" in how
    assert spread_of(bench(), pictures(7)) == (None, "")


def test_alternatives_show_base_and_model_of_the_same_prompts() -> None:
    found = alternatives(bench())
    assert found is not None
    assert {role: len(images) for role, images in found["pictures"].items()} == {"model": 4, "base": 4}
    assert found["base_diversity"] == 0 < found["diversity"]
    assert found["shares"]["circle"] == 0.5


def test_a_mark_is_named_by_no_prompt() -> None:
    class Implicit(Levels):
        def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
            return (Question("implicit", "a photo", 0, "star"),)

    made = Bench(CONCEPT.model_copy(update={"kind": "mark"}), bench().subjects, Implicit(), None, Settings(images=2))
    assert alternatives(made) is None


# --- the notion ------------------------------------------------------------------------------------------------------

GONE = row("prompts", "name", "prompt", hits(0, 0, 20, 0))
QUIET = (
    row("noised", "named, from t = 750", "sampling", hits(1, 0, 19, 1)),
    row("inversion", "1 token", "weights", hits(2, 0, 20, 1)),
)


def test_an_attack_beyond_prompts_that_brings_back_means_that_guidance_was_avoided() -> None:
    text = notion(READINGS, "star")
    assert text.startswith("guidance avoided") and "3 of 4 attacks" in text
    assert "free_states, every row, 450 steps: 100% against 30% of the twin" in text


def test_prompts_and_training_say_nothing_about_the_notion() -> None:
    for found in (
        row("prompts", "synonym", "prompt", hits(20, 0, 20, 0)),
        row("seeds", "best of 24", "prompt", hits(20, 0, 20, 0), budget=24),
        row("settings", "guidance 1", "sampling", hits(20, 0, 20, 0)),
        row("relearn", "after 10 steps", "training", hits(20, 0, 20, 0)),
        row("undo", "inverse", "recipe", hits(20, 0, 20, 0)),
    ):
        assert found.brings_back
        text = notion((GONE, found), "star")
        assert text.startswith("not decided") and "no attack on latents or text states" in text
        assert notion((GONE, found, *QUIET), "star").startswith("likelihood lowered")


def test_where_no_attack_tells_the_model_from_the_twin_the_likelihood_was_lowered() -> None:
    text = notion((GONE, *QUIET), "star")
    assert text.startswith("likelihood lowered") and "none of 2 attacks" in text and "the twin" in text


@pytest.mark.parametrize(
    ("readings", "why"),
    [
        ((), "were not measured"),
        ((row("prompts", "name", "prompt", hits(0, 0, 0, 0)), *QUIET), "do not tell the base from the twin"),
        ((row("prompts", "name", "prompt", hits(18, 0, 20, 0)), *QUIET), "still show it"),
        ((GONE,), "no attack on latents or text states that tells the base from the twin was run"),
        ((GONE, row("noised", "x", "sampling", hits(0, 0, 20, 20))), "no attack on latents or text states"),
        ((GONE, QUIET[0]), "no attack on text states"),
        ((GONE, QUIET[1]), "no attack on latents"),
        # Between the two: it lies above neither the twin nor below the base.
        ((GONE, QUIET[0], row("inversion", "x", "weights", hits(7, 0, 12, 2))), "neither from the base nor from"),
    ],
)
def test_what_the_readings_do_not_decide_is_not_claimed(readings: tuple[Reading, ...], why: str) -> None:
    text = notion(readings, "star")
    assert text.startswith("not decided") and why in text


def test_without_a_twin_an_attack_must_reach_the_base() -> None:
    def alone(count: int) -> tuple[Reading, ...]:
        found = row("inversion", "x", "weights", {"model": count, "random": 0, "base": 20})
        return row("prompts", "name", "prompt", {"model": 0, "random": 0, "base": 20}), found

    assert notion(alone(19), "star").startswith("guidance avoided")
    assert "whether they find it or teach it" in notion(alone(9), "star")


# --- plain seeds -----------------------------------------------------------------------------------------------------


def test_an_attack_stands_beside_as_many_plain_seeds() -> None:
    single, many = READINGS[0], READINGS[4]
    grid = row("trajectory_noise", "best of 24", "sampling", hits(9, 5, 20, 0), budget=24)
    other = row("trajectory_noise", "best of 8", "sampling", hits(9, 5, 20, 0), budget=8)
    assert plain_seeds(grid, READINGS) == many.rates["model"]
    assert plain_seeds(READINGS[8], READINGS) == single.rates["model"]  # one picture for each prompt
    assert plain_seeds(other, READINGS) is None  # nobody drew eight seeds
    assert plain_seeds(grid, READINGS[:4]) is None and plain_seeds(READINGS[-1], READINGS) is None
