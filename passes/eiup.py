"""EIUP: an erasure prompt that cross-attention reads beside the user's, and subtracts.

Chen et al.: "EIUP: A Training-Free Approach to Erase Non-Compliant Concepts Conditioned on Implicit Unsafe Prompts",
arXiv:2408.01014v1; its second version is "Growth Inhibitors for Suppressing Inappropriate Image Concepts". Nothing is
trained: the picture's own queries find the concept, whether or not the prompt names it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec.base import Pass
from erasec.errors import ErasecError, nearest
from erasec.model.edit import Edit, Memory
from erasec.training.denoiser import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


TOKENS = ("all", "words")


@dataclass(frozen=True)
class Eiup(Pass):
    """``words`` are the erasure prompt, by default the concept's names one after another.

    What attention to that prompt alone gives is added ``weight`` times, 0 or less, in the first ``until`` of the
    schedule and to the prompted half of a guided batch. ``tokens`` says what of it: "words", as published, the words'
    own columns of the map and no other; or "all" tokens, less what the empty prompt gives, so that only what sets the
    concept apart is taken away. ("all" is ours: with CLIP, much of a prompt's meaning lies in its end and padding.)
    """

    words: str = ""
    weight: float = -1.0
    until: float = 0.8
    tokens: str = "all"

    name: ClassVar[str] = "eiup"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2408.01014"
    summary: ClassVar[str] = (
        "no training: an erasure prompt beside the user's, subtracted where the picture attends to it"
    )
    when: ClassVar[str] = "where weights must stay as they are, and some loss on other pictures is no matter"
    limits: ClassVar[str] = "prompts that never name it keep much of it; without the memory the whole concept is back"
    leaves: ClassVar[frozenset[str]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        if not self.weight <= 0:
            raise ErasecError(
                f"eiup: option weight is {self.weight}", why="it takes 0 or less: more would add the concept"
            )
        if not 0 < self.until <= 1:
            raise ErasecError(
                f"eiup: option until is {self.until}", why="it takes a share of the steps, above 0 and to 1"
            )

        if self.tokens not in TOKENS:
            raise ErasecError(f"eiup: option tokens is {self.tokens!r}", why=nearest(self.tokens, TOKENS))

    def sites(self, model: Model) -> tuple[Site, ...]:
        """None: no weight changes."""
        check(model)
        return ()

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        check(model)
        sites = {site.key: site for site in model.select("cross", "kv")}
        names = (self.words,) if self.words else spoken(model, concept.phrases)
        words = " ".join(names)
        prompts = [(rows(model, words, self.tokens), self.weight)]
        if self.tokens == "all":
            empty = model.encode([""]).states[0].double()
            prompts.append(((empty, empty), -self.weight))
        memories = []
        for key, site in sites.items():
            if site.proj == "k":
                attention = key.removesuffix(".to_k.weight")
                k, v = model.weight(site), model.weight(sites[f"{attention}.to_v.weight"])
                for (keys, values), weight in prompts:
                    made = (keys @ k.T).float(), (values @ v.T).float()
                    memories.append(Memory(attention, *made, "side", weight, self.until, guided=True))
        told = {"memories": float(len(memories)), "rows": float(len(prompts[0][0][0])), "phrases": float(len(names))}
        return Edit({}, self.name, concept.name, asdict(self), model.digest, told, memories=tuple(memories))


def check(model: Model) -> None:
    """Raise ErasecError for a family whose pipeline reads no memory."""
    if model.family.name not in FAMILIES:
        raise ErasecError(
            f"eiup does not fit a model of the family {model.family.name}",
            why=f"its memory is read by the denoisers of {' and '.join(FAMILIES)}",
            fix="choose a closed-form pass: erasec list passes",
        )


def spoken(model: Model, phrases: Sequence[str]) -> tuple[str, ...]:
    """As many of the phrases, from the first, as one prompt has room for."""
    room = model.encode([""]).states.shape[1] - 2
    ends = [int(model.last_tokens([" ".join(phrases[:count])])) for count in range(1, len(phrases) + 1)]
    return tuple(phrases[: max(1, sum(end < room for end in ends))])


def rows(model: Model, words: str, tokens: str) -> tuple[Tensor, Tensor]:
    """Text states (t, d), float64, that become keys and those that become values: all tokens of the prompt both; with
    ``tokens`` "words" values other than the words' own are zero, so that the rest takes part in the softmax alone.

    Raises ErasecError where the words have no token.
    """
    found = model.encode([words])
    last = int(found.last[0])
    if last < 1:
        raise ErasecError(f"eiup: the erasure prompt {words!r} has no token", fix="give words that name the concept")
    states = found.states[0].double()
    if tokens == "all":
        return states, states
    values = torch.zeros_like(states)
    values[1 : last + 1] = states[1 : last + 1]
    return states, values
