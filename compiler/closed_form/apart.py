"""How close the text of what is kept lies to the text of what is erased, before anything is solved.

An edit of the matrices that read text moves all states that lie in the same direction. Compared are the states of the
last token of each phrase, as angles around a centre: text encoders give all phrases a large part in common, which says
nothing about them. The centre is the mean state of everyday words and of the phrases themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasec.recipe import everyday

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

REFERENCES = 32  # everyday captions whose mean state is in the centre
BATCH = 64


@dataclass(frozen=True)
class Pair:
    """An erased phrase and the kept phrase nearest to it; ``angle`` is the one between their states, in degrees."""

    concept: str
    erased: str
    kept: str
    angle: float


def closest_pairs(model: Model, concepts: Sequence[Concept]) -> tuple[Pair, ...]:
    """For each erased phrase that shares the build with a kept one, the kept phrase at the smallest angle; the smallest
    angles first. Kept phrases that another concept erases are left out, because the build erases them."""
    erased = {phrase.casefold() for concept in concepts for phrase in concept.phrases}
    kept = [phrase for concept in concepts for phrase in concept.keep if phrase.casefold() not in erased]
    kept = list(dict.fromkeys(kept))
    owners = {phrase: concept.name for concept in concepts for phrase in concept.phrases}
    if not kept:
        return ()
    smallest, columns = angles(model, tuple(owners), kept).min(1)
    pairs = (
        Pair(owners[phrase], phrase, kept[column], angle)
        for phrase, column, angle in zip(owners, columns.tolist(), smallest.tolist(), strict=True)
    )
    return tuple(sorted(pairs, key=lambda pair: pair.angle))


def angles(model: Model, erased: Sequence[str], kept: Sequence[str]) -> Tensor:
    """The angles (erased, kept) in degrees between the states of phrases, around the centre."""
    everything = everyday.captions()
    references = everything[:: max(1, len(everything) // REFERENCES)]
    states = _states(model, [*map(_caption, (*erased, *kept)), *references])
    states = states - states.mean(0)
    states = states / states.norm(dim=1, keepdim=True)
    cosines = states[: len(erased)] @ states[len(erased) : len(erased) + len(kept)].T
    degrees: Tensor = cosines.clamp(-1, 1).arccos().rad2deg()
    return degrees


def _caption(phrase: str) -> str:
    """All phrases in one context, so that only the phrases differ."""
    return f"a picture of {phrase}"


def _states(model: Model, texts: Sequence[str]) -> Tensor:
    """The states of the last tokens (n, d), in float64. Those of several encoders stand side by side."""
    import torch

    stream = next(iter(model.streams))
    rows = []
    for batch in _batches(texts):
        tokens = model.encode(batch, stream)
        chosen = zip(tokens.parts, tokens.lasts, strict=True)
        rows.append(torch.cat([part[torch.arange(len(last)), last] for part, last in chosen], 1).double())
    model.release_text_encoders()
    return torch.cat(rows)


def _batches(texts: Sequence[str]) -> Iterable[Sequence[str]]:
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
