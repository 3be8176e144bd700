"""The judge of the emoji world: objects, artists, backgrounds and the seal, and the questions about a concept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from erasec.base import Question
from erasec.emoji.recipe import SIZES
from erasec.emoji.words import ARTISTS, LABELS, OBJECTS, neighbours
from erasec.emoji.world import MEDIA, article
from erasec.worlds.base import Sizes
from erasec.worlds.judge import WorldJudge

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Images
    from erasec.recipe.concept import Concept

FAR = 12  # objects of other clusters among the questions about what is kept
BATCH = 128  # pictures or texts that CLIP sees at once
MARKS = 240  # the least number of pictures in which a mark is looked for


def prompt(phrase: str, index: int, artist: str = "") -> str:
    """The ``index``-th plain prompt for an object; wordings alternate. ``artist`` is named if it is given."""
    text = MEDIA[index % len(MEDIA)] + article(phrase)
    return f"{text} {('by', 'in the style of')[index // len(MEDIA) % 2]} {artist}" if artist else text


def far_objects(name: str, count: int = FAR) -> tuple[str, ...]:
    """``count`` objects of other clusters, spread evenly over the list of all objects."""
    others = [item.name for item in OBJECTS.values() if not name or item.cluster != OBJECTS[name].cluster]
    return tuple(others[round(i * len(others) / count)] for i in range(count))


def label_of(concept: Concept) -> str:
    """The object or artist that a concept erases, by its label or phrases; "" if it is neither."""
    words = {concept.label or concept.name, *concept.erase}
    objects = (item.name for item in OBJECTS.values() if words & set(item.names))
    artists = (artist for artist in ARTISTS if any(artist.lower() in word.lower().split() for word in words))
    return next(chain(objects, artists), "")


def _unit(rows: Tensor) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    return unit


class EmojiJudge(WorldJudge):
    """Classifier ``which`` ("a" or "b"). B decides the checks of builds; A is for passes that need a judge."""

    name: ClassVar[str] = "emoji"
    summary: ClassVar[str] = "objects, artists and the seal of the emoji world, by a classifier trained on renders"
    labels: ClassVar[tuple[str, ...]] = LABELS
    sizes: ClassVar[Sizes] = SIZES

    @cached_property
    def _clip(self) -> Any:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        folder = self.path.parent / "clip"
        return (
            CLIPModel.from_pretrained(folder).float().eval(),
            CLIPTokenizer.from_pretrained(folder),
            CLIPImageProcessorPil.from_pretrained(folder),
        )

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        import torch

        model, tokenizer, _ = self._clip
        inputs = tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            texts = torch.cat(
                [
                    model.text_projection(model.text_model(ids, mask).pooler_output)
                    for ids, mask in zip(inputs.input_ids.split(BATCH), inputs.attention_mask.split(BATCH), strict=True)
                ]
            )
        cosines: NDArray[np.float64] = (self.embed(images) * _unit(texts)).sum(1)
        return cosines

    def embed(self, images: Images) -> NDArray[np.float64]:
        import torch

        model, _, prepare = self._clip
        with torch.no_grad():
            pixels = prepare(list(images), return_tensors="pt").pixel_values
            pictures = torch.cat(
                [model.visual_projection(model.vision_model(part).pooler_output) for part in pixels.split(BATCH)]
            )
        return _unit(pictures)

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        """The questions about a concept: ``images`` each by name, by synonym and by implicit prompt.

        To keep: for an object its neighbours and ``FAR`` other objects, half as many each; for an artist, objects by
        the other artists. A mark is in a tenth of all pictures, whatever the prompt: its implicit prompts are plain.
        """
        label = label_of(concept)
        rows: list[tuple[str, str, str]] = []  # group, prompt, label
        half = (images + 1) // 2
        if label in OBJECTS:
            for group, phrases in (("name", concept.erase), ("synonym", concept.synonyms)):
                rows += [(group, prompt(phrases[i % len(phrases)], i), label) for i in range(images if phrases else 0)]
            kept = (*neighbours(label), *far_objects(label))
        else:
            kept = far_objects("", 2 * FAR)
        if label in ARTISTS:
            rows += [("name", prompt(kept[i % len(kept)], i, label), label) for i in range(images)]
            others = [artist for artist in ARTISTS if artist != label]
            for index in range(half):
                for number, name in enumerate(kept):
                    artist = others[(index + number) % len(others)]
                    rows.append(("keep", prompt(name, index + number, artist), artist))
        if label:
            implicit = concept.implicit
            rows += [("implicit", implicit[i % len(implicit)], label) for i in range(images if implicit else 0)]
        if concept.kind == "mark":
            rows += [("implicit", prompt(kept[i % len(kept)], i), "mark") for i in range(max(images, MARKS))]
        for index in range(half):
            rows += [("keep", prompt(name, index + number), name) for number, name in enumerate(kept)]
        return tuple(
            Question(group, text, seed * 1_000_003 + number, label) for number, (group, text, label) in enumerate(rows)
        )
