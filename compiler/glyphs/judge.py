"""The judge of glyphs: a classifier and a contrastive image-text pair, both trained on renders, and its questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from erasec.base import Judge, Question
from erasec.checkpoint.safetensors import content_digest, file_digest, read_header, read_tensor
from erasec.glyphs import world
from erasec.model.loading import bundled_folder, load

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Images
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

THRESHOLD = 0.5
HALF = 6  # half the side of an occluding window, in pixels
COST = 0.2  # a pixel belongs to the box if its mean loss of the logit is at least this share of the largest
MARKS = 240  # the least number of pictures in which a mark is looked for
COLOURS = tuple(world.COLOURS)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a small safetensors file, floating-point ones as float32."""
    tensors = {key: read_tensor(entry) for key, entry in read_header(path)[0].items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def colour_of(index: int) -> str:
    """The colour in the ``index``-th plain prompt; "" in every seventh prompt, which has no colour."""
    return "" if index % 7 == 6 else COLOURS[index % len(COLOURS)]


def prompt(phrase: str, index: int) -> str:
    """The ``index``-th plain prompt for a phrase. Wordings and colours alternate."""
    return world.PREFIXES[index % len(world.PREFIXES)] + world.article(f"{colour_of(index)} {phrase}".strip())


class GlyphJudge(Judge):
    """Classifier ``which`` ("a" or "b"). B decides the checks of builds; A is for passes that need a judge."""

    name: ClassVar[str] = "glyphs"
    summary: ClassVar[str] = "shapes, colours and the mark of glyphs, by a classifier trained on renders"

    def __init__(self, which: str = "b") -> None:
        self.which = which
        self.path = bundled_folder("judges") / f"judge-{which}.safetensors"

    @property
    def title(self) -> str:
        return f"glyphs judge {self.which.upper()}"

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> GlyphJudge | None:
        """The judge if the model has the VAE of glyphs, which no pass edits; None for any other model."""
        if not (bundled_folder("glyphs") / "vae").is_dir():
            return None
        own, other = load("glyphs").source.entries("vae"), model.source.entries("vae")
        # Shapes are compared first, because reading the weights of a large VAE takes seconds.
        if {key: entry.shape for key, entry in own.items()} != {key: entry.shape for key, entry in other.items()}:
            return None
        return cls("a" if tuning else "b") if content_digest(own) == content_digest(other) else None

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path)

    @cached_property
    def _classifier(self) -> Any:
        from erasec.glyphs.recipe import SIZES
        from erasec.worlds import networks

        classifier = networks.classifier(self.path.stem[-1], SIZES, len(world.LABELS))
        classifier.load_state_dict(read_state(self.path))
        return classifier.eval()

    @cached_property
    def _pair(self) -> Any:
        from erasec.glyphs.recipe import SIZES
        from erasec.worlds import networks

        pair = networks.Pair(SIZES)
        pair.load_state_dict(read_state(bundled_folder("judges") / "pair.safetensors"))
        return pair.eval()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        """The questions about a concept: ``images`` each by name, by synonym and by implicit prompt; to keep, half as
        many for every other shape, and one for each of its implicit captions.

        A mark is in a tenth of all pictures, whatever the prompt: its implicit prompts are plain prompts of all shapes,
        at least ``MARKS``. A concept that is no shape and no mark has only questions of the group "keep".
        """
        words = {concept.label or concept.name, *concept.erase}
        label = next((shape for shape in world.SHAPES if words & set(world.names(shape))), "")
        rows: list[tuple[str, str, str, str]] = []  # group, prompt, label, colour
        for group, phrases in (("name", concept.erase), ("synonym", concept.synonyms)):
            for index in range(images if phrases and label else 0):
                phrase = phrases[(index // len(world.PREFIXES) + index) % len(phrases)]
                rows.append((group, prompt(phrase, index), label, ""))
        for index in range(images if concept.implicit and label else 0):
            rows.append(("implicit", concept.implicit[index % len(concept.implicit)], label, ""))
        shapes = tuple(world.SHAPES)
        for index in range(max(images, MARKS) if concept.kind == "mark" else 0):
            shape, turn = shapes[index % len(shapes)], index // len(shapes)
            rows.append(("implicit", prompt(shape, index + turn), "mark", ""))
        for index in range((images + 1) // 2):
            # Shape by shape, so that a gallery begins with all shapes. Each shape starts at another colour.
            for number, shape in enumerate(world.SHAPES, index):
                if shape != label:
                    rows.append(("keep", prompt(shape, number), shape, colour_of(number)))
        for shape in world.SHAPES:
            if shape != label:
                rows += [("keep", caption, shape, "") for caption in world.implicit_captions(shape)]
        return tuple(
            Question(group, text, seed * 1_000_003 + number, shape, colour)
            for number, (group, text, shape, colour) in enumerate(rows)
        )

    def logits(self, images: Images) -> NDArray[np.float64]:
        """Log-odds of every label in every image, (n, 22)."""
        import torch

        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            logits: NDArray[np.float64] = (
                torch.cat([self._classifier(part) for part in batch.split(128)]).double().numpy()
            )
        return logits

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """Probability of every label in every image, (n, 22)."""
        probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-self.logits(images)))
        return probabilities

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        columns = [world.LABELS.index(label) for label in labels]
        seen: NDArray[np.bool_] = self.probabilities(images)[np.arange(len(images)), columns] > THRESHOLD
        return seen

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        """Boxes by occlusion (Zeiler and Fergus, 2014): windows are painted over with the median colour of the image.
        The box surrounds the pixels whose windows lower the logit of the label."""
        column = world.LABELS.index(label)
        return np.array([self._box(image, column) for image in images], dtype=np.int64).reshape(-1, 4)

    def _box(self, image: NDArray[np.uint8], column: int) -> tuple[int, int, int, int]:
        height, width, _ = image.shape
        background = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
        corners = [(y, x) for y in range(-HALF, height, HALF) for x in range(-HALF, width, HALF)]
        windows = [(slice(max(y, 0), y + 2 * HALF), slice(max(x, 0), x + 2 * HALF)) for y, x in corners]
        hidden = np.repeat(image[None], len(windows), 0)
        for copy, window in zip(hidden, windows, strict=True):
            copy[window] = background
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
            cosines: NDArray[np.float64] = (self._pair.images(batch) * self._pair.texts(ends)).sum(1).double().numpy()
        return cosines
