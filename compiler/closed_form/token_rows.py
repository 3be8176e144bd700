"""Rows of text states: which tokens of which prompts a closed-form edit changes, and which tokens they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasec.recipe.concept import Concept, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.text_encoders import Tokens
    from erasec.model.view import Model


# The empty prompt, which has no phrase.
EMPTY = Prompt("", "", "")


@dataclass(frozen=True)
class Spans:
    """Encoded prompts and where their phrases are.

    ``states`` are the text states (n, t, d). ``first``, ``last`` and ``end`` are token indices, one for each prompt:
    the first and the last token of its phrase, and the first end token. Pooled states have t = 1, and all indices are
    0.
    """

    states: Tensor
    first: list[int]
    last: list[int]
    end: list[int]


def find_spans(model: Model, prompts: Sequence[Prompt], stream: str) -> list[Spans]:
    """Encode the prompts and find their phrases, in each part of a stream.

    Token indices come from the tokenizer, which may split a word into several tokens. The empty prompt has no phrase;
    its first end token is taken instead. (The reference codes take the start token, whose state is the same in every
    prompt and which draws attention at every position.)
    """
    tokens: Tokens = model.encode([prompt.text for prompt in prompts], stream)
    spans = []
    for part, states in enumerate(tokens.parts):
        length = states.shape[1]
        if length == 1:
            zeros = [0] * len(prompts)
            spans.append(Spans(states, zeros, zeros, zeros))
            continue
        last = model.last_tokens([prompt.upto for prompt in prompts], stream, part)
        first = model.last_tokens([prompt.before for prompt in prompts], stream, part) + 1
        end = int(model.last_tokens([""], stream, part)) + 1
        spans.append(
            Spans(
                states,
                first.clamp(max=length - 1).tolist(),
                last.clamp(min=end).tolist(),
                (tokens.lasts[part] + 1).clamp(max=length - 1).tolist(),
            )
        )
    return spans


def _last(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(source.last[row], goal.last[row])]


def _tail(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    start, stop = source.last[row], goal.last[row]
    count = source.states.shape[1] - max(start, stop)
    return [(start + step, stop + step) for step in range(count)]


def _all(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(index, index) for index in range(source.states.shape[1])]


def _context(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    before = [(index, index) for index in range(min(source.first[row], goal.first[row]))]
    return before + _tail(source, goal, row)[1:]


def _words(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(index, goal.last[row]) for index in range(source.first[row], source.last[row] + 1)]


def _eot(source: Spans, goal: Spans, row: int) -> list[tuple[int, int]]:
    return [(source.end[row], goal.end[row])]


# Which tokens of a prompt become which tokens of its goal's prompt: pairs of token indices.
SELECTORS: dict[str, Callable[[Spans, Spans, int], list[tuple[int, int]]]] = {
    "last": _last,  # the phrase's last token (UCE, 2025)
    "tail": _tail,  # from there to the end, padding included; the longer side is cut (UCE, 2023)
    "all": _all,  # all positions (RECE)
    "context": _context,  # all except the phrase's own tokens, aligned before and after the phrase (MACE)
    "words": _words,  # each of the phrase's own tokens becomes the last token of the goal's phrase
    "eot": _eot,  # the first end token (TRCE)
}


def row_pairs(
    model: Model, prompts: Sequence[Prompt], targets: Sequence[Prompt], selector: str, stream: str
) -> tuple[Tensor, Tensor]:
    """Text states (n, d) of ``prompts``, and those of ``targets`` (n, d) that they become, one target per prompt.

    ``selector``, a key of ``SELECTORS``, chooses the tokens.
    """
    return select_rows(find_spans(model, prompts, stream), find_spans(model, targets, stream), selector)


def erased_rows(model: Model, concept: Concept, selector: str, stream: str) -> tuple[Tensor, Tensor]:
    """Text states (n, d) of the concept's phrases in its templates, and those of their goals (n, d) that they
    become."""
    return row_pairs(model, concept.prompts(concept.phrases), goal_prompts(concept, concept.phrases), selector, stream)


def neutral_rows(model: Model, concept: Concept, stream: str, most: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """For each part of a stream, text states (n, d) of the concept's phrases in its templates, from the phrase's last
    token to the end, and neutral states (n, d): the mean of those of the kept phrases at the same places of the same
    templates.

    For a concept without kept phrases the states of its goals are taken. With ``most``, only so many of each prompt.
    """
    import torch

    sources = find_spans(model, concept.prompts(concept.phrases), stream)
    if not concept.keep:
        goals = find_spans(model, goal_prompts(concept, concept.phrases), stream)
        selector = "last" if most == 1 else "tail"
        return [select_rows([source], [goal], selector) for source, goal in zip(sources, goals, strict=True)]
    kept, pairs = find_spans(model, concept.prompts(concept.keep), stream), []
    for source, other in zip(sources, kept, strict=True):
        rows: list[Tensor] = []
        neutral: list[Tensor] = []
        length, templates = source.states.shape[1], len(concept.templates)
        for template in range(templates):
            others = range(template, len(other.states), templates)
            mine = range(template, len(source.states), templates)
            # All tails are cut to that of the longest prompt.
            stops = [other.last[row] for row in others] + [source.last[row] for row in mine]
            count = min(length - max(stops), most or length) if length > 1 else 1
            tails = [other.states[row, other.last[row] : other.last[row] + count] for row in others]
            mean = torch.stack(tails).mean(0)
            for row in mine:
                rows.append(source.states[row, source.last[row] : source.last[row] + count])
                neutral.append(mean)
        pairs.append((torch.cat(rows), torch.cat(neutral)))
    return pairs


def select_rows(sources: Sequence[Spans], targets: Sequence[Spans], selector: str) -> tuple[Tensor, Tensor]:
    """The pairs of text states that ``selector`` chooses, from all parts of a stream: one matrix reads them all."""

    import torch

    source_rows: list[Tensor] = []
    target_rows: list[Tensor] = []
    for source, target in zip(sources, targets, strict=True):
        # A prompt has only one pooled state, so every selector chooses it.
        select = _last if source.states.shape[1] == 1 else SELECTORS[selector]
        pairs = [(row, *pair) for row in range(len(source.states)) for pair in select(source, target, row)]
        index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)
        source_rows.append(source.states[index[:, 0], index[:, 1]])
        target_rows.append(target.states[index[:, 0], index[:, 2]])
    return torch.cat(source_rows), torch.cat(target_rows)


def uniform_weights(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Equal weights (n,) for the rows, which add up to ``scale``."""

    import torch

    return torch.full((len(rows),), scale / max(1, len(rows)), dtype=torch.float64)


def goal_prompts(concept: Concept, phrases: Sequence[str]) -> list[Prompt]:
    """For each phrase, its goal in every template; the empty prompt for a phrase without a goal."""
    prompts: list[Prompt] = []
    for phrase in phrases:
        goal = concept.goal(phrase)
        prompts += concept.prompts([goal]) if goal else [EMPTY] * len(concept.templates)
    return prompts
