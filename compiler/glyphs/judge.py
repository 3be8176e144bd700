"""The judge of glyphs: its labels, its contrastive pair of images and texts, and its questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from erasec.base import Question
from erasec.glyphs import world
from erasec.glyphs.recipe import SIZES
from erasec.model.loading import load
from erasec.worlds.base import Sizes
from erasec.worlds.judge import WorldJudge, read_state

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from erasec.base import Images
    from erasec.recipe.concept import Concept

MARKS = 240  # the least number of pictures in which a mark is looked for
COLOURS = tuple(world.COLOURS)


def colour_of(index: int) -> str:
    """The colour in the ``index``-th plain prompt; "" in every seventh prompt, which has no colour."""
    return "" if index % 7 == 6 else COLOURS[index % len(COLOURS)]


def prompt(phrase: str, index: int) -> str:
    """The ``index``-th plain prompt for a phrase. Wordings and colours alternate."""
    return world.PREFIXES[index % len(world.PREFIXES)] + world.article(f"{colour_of(index)} {phrase}".strip())


class GlyphJudge(WorldJudge):
    """Classifier ``which`` ("a" or "b"). B decides the checks of builds; A is for passes that need a judge."""

    name: ClassVar[str] = "glyphs"
    summary: ClassVar[str] = "shapes, colours and the mark of glyphs, by a classifier trained on renders"
    labels: ClassVar[tuple[str, ...]] = world.LABELS
    sizes: ClassVar[Sizes] = SIZES

    @cached_property
    def _pair(self) -> Any:
        from erasec.worlds import networks

        pair = networks.Pair(SIZES)
        pair.load_state_dict(read_state(self.path.parent / "pair.safetensors"))
        return pair.eval()

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        import torch

        tokens = load("glyphs").encode(prompts)
        with torch.no_grad():
            ends = tokens.states[torch.arange(len(tokens.last)), tokens.last + 1]
            cosines: NDArray[np.float64] = (self._embeddings(images) * self._pair.texts(ends)).sum(1).double().numpy()
        return cosines

    def embed(self, images: Images) -> NDArray[np.float64]:
        embeddings: NDArray[np.float64] = self._embeddings(images).double().numpy()
        return embeddings

    def _embeddings(self, images: Images) -> Tensor:
        """Unit embeddings of the contrastive pair, (n, d)."""
        import torch

        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            embeddings: Tensor = self._pair.images(batch)
        return embeddings

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
