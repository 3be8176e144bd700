"""The judge of glyphs: a classifier and a contrastive pair that were trained on renders, and the questions they ask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import content_digest, file_digest, read_header, read_tensor
from erasec.glyphs import world
from erasec.judging.judge import Images, Question
from erasec.model.view import bundled, load

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

THRESHOLD = 0.5
HALF = 6  # half the side of the windows that are painted over to find a box, in pixels
COST = 0.2  # share of the highest mean cost, in logits, above which a pixel belongs to the box
MARKS = 240  # pictures in which a mark is looked for
COLOURS = tuple(world.COLOURS)


def read_state(path: Path) -> dict[str, Tensor]:
    """A small safetensors file as float32 tensors (integer ones as they are)."""
    tensors = {key: read_tensor(entry) for key, entry in read_header(path)[0].items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def colour_of(index: int) -> str:
    """The colour that the ``index``-th plain prompt asks for; every seventh asks for none."""
    return "" if index % 7 == 6 else COLOURS[index % len(COLOURS)]


def prompt(phrase: str, index: int) -> str:
    """The ``index``-th plain prompt for a phrase: wordings and colours take turns."""
    return world.PREFIXES[index % len(world.PREFIXES)] + world.article(f"{colour_of(index)} {phrase}".strip())


class GlyphJudge:
    """Reader ``which`` ("a" or "b") behind the Judge protocol. Builds ask B; A is for whatever is tuned by a judge."""

    def __init__(self, which: str = "b") -> None:
        self.path = bundled("judges") / f"judge-{which}.safetensors"
        self.name = f"glyphs judge {which.upper()}"

    @classmethod
    def for_model(cls, model: Model, which: str = "b") -> GlyphJudge | None:
        """The judge where the model paints with glyphs' own VAE, which no pass edits; None for any other world."""
        own = bundled("glyphs") / "vae"
        if not own.is_dir():
            return None
        ours = content_digest(load("glyphs").source.entries("vae"))
        return cls(which) if content_digest(model.source.entries("vae")) == ours else None

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path)

    @cached_property
    def _reader(self) -> Any:
        from erasec.glyphs import models

        reader = models.reader(self.path.stem[-1])
        reader.load_state_dict(read_state(self.path))
        return reader.eval()

    @cached_property
    def _pair(self) -> Any:
        from erasec.glyphs import models

        pair = models.Pair()
        pair.load_state_dict(read_state(bundled("judges") / "pair.safetensors"))
        return pair.eval()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        """``images`` questions by name, by synonym and by implicit prompt; half as many for every other shape, and one
        for each implicit prompt of those.

        A mark comes with any prompt: plain ones of all shapes are its implicit ones, and as a tenth of them shows it,
        ``MARKS`` at least. A concept that is nothing of this world gets the questions about what stays, and none about
        what goes.
        """
        words = {concept.label or concept.name, *concept.erase}
        label = next((shape for shape in world.SHAPES if words & set(world.names(shape))), "")
        wanted: list[tuple[str, str, str, str]] = []
        for group, phrases in (("name", concept.erase), ("synonym", concept.synonyms)):
            for index in range(images if phrases and label else 0):
                phrase = phrases[(index // len(world.PREFIXES) + index) % len(phrases)]
                wanted.append((group, prompt(phrase, index), label, ""))
        for index in range(images if concept.implicit and label else 0):
            wanted.append(("implicit", concept.implicit[index % len(concept.implicit)], label, ""))
        every = tuple(world.SHAPES)
        for index in range(max(images, MARKS) if concept.kind == "mark" else 0):
            shape, turn = every[index % len(every)], index // len(every)
            wanted.append(("implicit", prompt(shape, index + turn), "mark", ""))
        for index in range((images + 1) // 2):
            # Shape by shape, so that the first few of a gallery show all of them, and each begins at another colour.
            for number, shape in enumerate(world.SHAPES, index):
                if shape != label:
                    wanted.append(("keep", prompt(shape, number), shape, colour_of(number)))
        for shape in world.SHAPES:
            if shape != label:
                wanted += [("keep", caption, shape, "") for caption in world.implicit_captions(shape)]
        return tuple(
            Question(group, text, seed * 1_000_003 + number, shape, colour)
            for number, (group, text, shape, colour) in enumerate(wanted)
        )

    def logits(self, images: Images) -> NDArray[np.float64]:
        """Log-odds of every label in every image, (n, 22)."""
        import torch

        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            found: NDArray[np.float64] = torch.cat([self._reader(part) for part in batch.split(128)]).double().numpy()
        return found

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """Probability of every label in every image, (n, 22)."""
        found: NDArray[np.float64] = 1 / (1 + np.exp(-self.logits(images)))
        return found

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        columns = [world.LABELS.index(label) for label in labels]
        found: NDArray[np.bool_] = self.probabilities(images)[np.arange(len(images)), columns] > THRESHOLD
        return found

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        """By occlusion: around the pixels under the windows that cost the label its logit when they are painted over
        with the image's median colour."""
        column = world.LABELS.index(label)
        return np.array([self._box(image, column) for image in images], dtype=np.int64).reshape(-1, 4)

    def _box(self, image: NDArray[np.uint8], column: int) -> tuple[int, int, int, int]:
        height, width, _ = image.shape
        ground = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
        corners = [(y, x) for y in range(-HALF, height, HALF) for x in range(-HALF, width, HALF)]
        windows = [(slice(max(y, 0), y + 2 * HALF), slice(max(x, 0), x + 2 * HALF)) for y, x in corners]
        hidden = np.repeat(image[None], len(windows), 0)
        for copy, window in zip(hidden, windows, strict=True):
            copy[window] = ground
        costs = self.logits(image[None])[0, column] - self.logits(hidden)[:, column]
        heat, count = np.zeros((height, width)), np.zeros((height, width))
        for window, cost in zip(windows, costs, strict=True):
            heat[window] += cost
            count[window] += 1
        heat /= count
        rows, columns = np.nonzero(heat >= COST * heat.max())
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        import torch

        tokens = load("glyphs").encode(prompts)
        with torch.no_grad():
            ends = tokens.states[torch.arange(len(tokens.last)), tokens.last + 1]
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            found: NDArray[np.float64] = (self._pair.images(batch) * self._pair.texts(ends)).sum(1).double().numpy()
        return found
