"""A judge of your own in one file: see ``examples/red.toml``, or add ``--judge examples/my_judge.py:ColourJudge``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erasec import Concept, Model
from erasec.base import Judge, Question
from erasec.checkpoint.safetensors import file_digest

COLOURS = {"red": (222, 38, 44), "green": (40, 168, 72), "blue": (48, 96, 235), "yellow": (248, 220, 48)}


class ColourJudge(Judge):
    """Judges colours by pixels: a picture shows a colour if at least 1 % of its pixels are at most 60 away in RGB."""

    name = "colours"
    summary = "an example: the colours red, green, blue and yellow, by counting pixels"
    digest = file_digest(Path(__file__))  # the judge decides by nothing but this file

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> "ColourJudge | None":
        return None if tuning else cls()  # it can count the pixels of any model; there is no second judge

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        rows = [("name" if colour in concept.erase else "keep", colour, n) for colour in COLOURS for n in range(images)]
        return tuple(Question(group, f"a {colour} heart", seed * 1000 + n, colour, colour) for group, colour, n in rows)

    def shares(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:  # of the pixels that have a colour, (n, 4)
        near = [np.linalg.norm(images - np.array(rgb), axis=3) <= 60 for rgb in COLOURS.values()]
        return np.asarray(np.stack(near, axis=3).mean(axis=(1, 2)))

    def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
        return self.shares(images)[np.arange(len(images)), [list(COLOURS).index(label) for label in labels]] >= 0.01

    def agreement(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64]:
        shares, words = self.shares(images), np.array([[name in text.split() for name in COLOURS] for text in prompts])
        return np.asarray((shares * words).sum(1) / np.sqrt(np.maximum((shares**2).sum(1) * words.sum(1), 1e-12)))
