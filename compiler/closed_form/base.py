"""Closed-form passes are row tables: which token states of which prompts go where, and one solver for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from erasec.base import Context, Pass
from erasec.closed_form import priors
from erasec.closed_form import solver as closed_form
from erasec.closed_form.solver import Solution, System
from erasec.errors import ErasecError
from erasec.model.edit import Edit, Remap
from erasec.recipe.concept import Concept, Prompt

if TYPE_CHECKING:
    from erasec.family import Site
    from erasec.model.text_encoders import Tokens
    from erasec.model.view import Model

EMPTY = Prompt("", "", "")
Sums = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spans:
    """Encoded prompts with the places of their phrases: token states (n, t, d); ``first`` and ``last`` token of each
    phrase and ``end``, the first end token, as (n,) indices. Pooled states have t = 1, and all places are 0."""

    states: Tensor
    first: list[int]
    last: list[int]
    end: list[int]


def spans(model: Model, prompts: Sequence[Prompt], stream: str) -> list[Spans]:
    """The prompts in each part of a stream. Token indices are true ones, from the tokenizer: a word may be several.

    The empty prompt has no phrase: its place is its first end token. (The references take the start token, whose state
    is the same in every prompt and draws attention wherever it stands.)
    """
    tokens: Tokens = model.encode([prompt.text for prompt in prompts], stream)
    found = []
    for part, states in enumerate(tokens.parts):
        length = states.shape[1]
        if length == 1:
            zeros = [0] * len(prompts)
            found.append(Spans(states, zeros, zeros, zeros))
            continue
        last = model.last_tokens([prompt.upto for prompt in prompts], stream, part)
        first = model.last_tokens([prompt.before for prompt in prompts], stream, part) + 1
        end = int(model.last_tokens([""], stream, part)) + 1
        found.append(Spans(
            states,
            first.clamp(max=length - 1).tolist(),
            last.clamp(min=end).tolist(),
            (tokens.lasts[part] + 1).clamp(max=length - 1).tolist(),
        ))  # fmt: skip
    return found


def _last(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(source.last[row], goal.last[row])]


def _tail(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    start, stop = source.last[row], goal.last[row]
    count = source.states.shape[1] - max(start, stop)
    return [(start + step, stop + step) for step in range(count)]


def _all(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(place, place) for place in range(source.states.shape[1])]


def _context(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    before = [(place, place) for place in range(min(source.first[row], goal.first[row]))]
    return before + _tail(source, goal, row)[1:]


def _words(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    own = range(source.first[row], source.last[row] + 1)
    return [(place, goal.last[row]) for place in own]


def _eot(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(source.end[row], goal.end[row])]


# Which token states of a prompt become which of its goal's.
SELECTORS: dict[str, Callable[[Spans, Spans, int], list[tuple[int, int]]]] = {
    "last": _last,  # the phrase's last token (UCE, 2025)
    "tail": _tail,  # from there to the end, pads included; the longer side trimmed (UCE, 2023)
    "all": _all,  # all positions (RECE)
    "context": _context,  # all but the phrase's own tokens, aligned from the front and behind the phrase (MACE)
    "words": _words,  # the phrase's own tokens, each to the last token of the goal's phrase
    "eot": _eot,  # the first end token (TRCE)
}


def pairs(
    model: Model, prompts: Sequence[Prompt], goals: Sequence[Prompt], selector: str, stream: str
) -> tuple[Tensor, Tensor]:
    """Rows (n, d) of ``prompts``, and the rows of ``goals`` that they are to become."""
    return chosen(spans(model, prompts, stream), spans(model, goals, stream), selector)


def erased(model: Model, concept: Concept, selector: str, stream: str) -> tuple[Tensor, Tensor]:
    """Rows (n, d) of the concept's phrases in its templates, and the rows of their goals."""
    return pairs(model, concept.prompts(concept.phrases), goals(concept, concept.phrases), selector, stream)


def chosen(sources: Sequence[Spans], goals: Sequence[Spans], selector: str) -> tuple[Tensor, Tensor]:
    """The rows that a selector takes of each part of a stream: together, as one matrix reads them all."""
    rows: list[Tensor] = []
    becomes: list[Tensor] = []
    for source, goal in zip(sources, goals, strict=True):
        # A pooled state is the one row there is, whatever the selector.
        take = _last if source.states.shape[1] == 1 else SELECTORS[selector]
        places = [(row, *pair) for row in range(len(source.states)) for pair in take(source, goal, row)]
        index = torch.tensor(places, dtype=torch.long).reshape(-1, 3)
        rows.append(source.states[index[:, 0], index[:, 1]])
        becomes.append(goal.states[index[:, 0], index[:, 2]])
    return torch.cat(rows), torch.cat(becomes)


@dataclass(frozen=True)
class ClosedForm(Pass):
    """Base of the passes that fill ``table`` and may change ``solution``; several concepts are solved as one system.

    Their options in common: ``scale`` weighs the erased rows and ``keep`` the kept ones, each side a mean over its
    rows, so that neither depends on how many prompts there are; ``ridge`` is the regulariser, in units of the Gram's
    mean diagonal if ``relative``, else as in the papers; ``prior`` is a file of ``erasec prior``, whose captions are
    kept too, with the weight ``prior_weight``.
    """

    scale: float = 1.0
    keep: float = 1.0
    ridge: float = 1e-3
    relative: bool = True
    prior: str = ""
    prior_weight: float = 1.0

    limits: ClassVar[str] = (
        "It remaps what prompts say and leaves what the denoiser knows in place: learned embeddings, or attacks with "
        "access to the weights, may bring the concept back, and none were tested here."
    )

    def __post_init__(self) -> None:
        if self.scale <= 0 or self.keep < 0 or self.prior_weight < 0:
            raise ErasecError(
                f"{self.name}: scale is {self.scale:g}, keep {self.keep:g}, prior_weight {self.prior_weight:g}",
                why="scale > 0, keep >= 0 and prior_weight >= 0",
            )

    @abstractmethod
    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        """Token states to erase (n, d) and what they become (n, d)."""

    def sites(self, model: Model) -> tuple[Site, ...]:
        return tuple(site for sites in model.streams.values() for site in sites)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        return next(self.solve_all(model, [concept], context))

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """One edit for all concepts: the sum of what they ask for, whatever their order."""
        sums: dict[str, dict[str, Tensor]] = {"": self.shared(model)}
        asked = {}
        for concept in apart(concepts):
            sums[concept.name] = self.sums(model, concept)
            asked[concept.name] = {"erase": list(concept.phrases), "keep": list(concept.keep)}
        yield replace(self.edit(model.streams, sums), base=model.digest, asked=asked)

    def sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """What the concept asks for, by stream and name: all that solving needs of the model."""
        found: dict[str, Tensor] = {}
        for stream in model.streams:
            asked = self.system(model, concept, stream).compact()
            found |= pack(asked, stream)
        return found

    def system(self, model: Model, concept: Concept, stream: str) -> System:
        source, target = self.table(model, concept, stream)
        return closed_form.system(
            source, target, mean(source, self.scale * concept.scale), *self.kept(model, concept, stream)
        )

    def kept(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        """Rows that stay (m, d) and their weights: the empty prompt's and the keep phrases'."""
        texts = ["", *(prompt.text for prompt in concept.prompts(concept.keep))]
        rows = model.encode(texts, stream).states.flatten(0, 1)
        return rows, mean(rows)

    def shared(self, model: Model) -> dict[str, Tensor]:
        """What solving needs of the model beside the concepts: the prior, where one is given."""
        if not self.prior:
            return {}
        return {f"{stream}.prior": priors.read(self.prior, model, stream) for stream in model.streams}

    def edit(self, streams: Mapping[str, tuple[Site, ...]], sums: Mapping[str, Sums]) -> Edit:
        """Solve from the sums alone, concepts in the order of their names, so that the order given does not matter."""
        names = sorted(name for name in sums if name)
        deltas: dict[Site, Remap] = {}
        told: dict[str, float] = {}
        for stream, sites in streams.items():
            systems = [unpack(sums[name], stream) for name in names]
            asked = closed_form.joint(systems)
            if (prior := sums.get("", {}).get(f"{stream}.prior")) is not None:
                more = prior * self.prior_weight**0.5
                asked = System(asked.source, asked.shift, torch.cat([asked.keep, more]), asked.lost)
            solution = self.solution(asked, stream, sums)
            remap = Remap(*closed_form.reduced(solution.left, solution.right))
            deltas |= dict.fromkeys(sites, remap)
            prefix = "" if stream == "context" else f"{stream}."
            found = closed_form.stats(asked, Solution(remap.left, remap.right, solution.ridge, solution.condition))
            told |= {f"{prefix}{key}": value for key, value in found.items()}
        params = asdict(cast("Any", self))
        return Edit(deltas, self.name, ", ".join(names), params, stats=told, sums=sums)

    def solution(self, asked: System, stream: str, sums: Mapping[str, Sums]) -> Solution:
        return closed_form.solve(asked, self.ridge, self.keep, self.relative)


def apart(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts without the keep phrases that one of them erases."""
    erased = {phrase.casefold() for concept in concepts for phrase in concept.phrases}
    kept = [tuple(phrase for phrase in concept.keep if phrase.casefold() not in erased) for concept in concepts]
    return [concept.model_copy(update={"keep": keep}) for concept, keep in zip(concepts, kept, strict=True)]


def mean(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Equal weights (n,) that add up to ``scale``."""
    return torch.full((len(rows),), scale / max(1, len(rows)), dtype=torch.float64)


def goals(concept: Concept, phrases: Sequence[str]) -> list[Prompt]:
    """The prompts of the phrases' goals, template by template; the empty prompt where a phrase becomes nothing."""
    found = []
    for phrase in phrases:
        goal = concept.goal(phrase)
        found += concept.prompts([goal]) if goal else [EMPTY] * len(concept.templates)
    return found


def pack(asked: System, stream: str) -> dict[str, Tensor]:
    """A system as named tensors, for the sums of an edit; laid out as a file gives them back, so that bits agree."""
    parts = {"source": asked.source, "shift": asked.shift, "keep": asked.keep}
    return {f"{stream}.{key}": value.contiguous() for key, value in parts.items()} | {
        f"{stream}.lost": torch.tensor([asked.lost], dtype=torch.float64)
    }


def unpack(sums: Sums, stream: str) -> System:
    """What ``pack`` packed."""
    source, shift, keep = (sums[f"{stream}.{key}"] for key in ("source", "shift", "keep"))
    return System(source, shift, keep, float(sums[f"{stream}.lost"]))
