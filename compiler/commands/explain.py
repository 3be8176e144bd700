"""``erasec explain``: how far an edit moves the text of a prompt, and what the text comes near to. Paints nothing.

A text state x reaches the denoiser through the matrices W_l that read it. With W'_l after the edit, x moves by

    sqrt(sum_l |W'_l x - W_l x|^2 / sum_l |W_l x|^2),

and is as far from another state y before the edit as sqrt(sum_l |W'_l x - W_l y|^2 / sum_l |W_l x|^2). Three sums over
the sites give both (``closed_form.reach``). Edits of other weights do not show here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.safetensors import read_header
from erasec.closed_form.reach import Sums, site_sums
from erasec.commands.built import find_built
from erasec.errors import ErasecError
from erasec.model.edit_file import METADATA, read_edits
from erasec.model.loading import load
from erasec.recipe.concept import find
from erasec.recipe.goals import names_phrase
from erasec.selection import world_of

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

SUFFIX = ".safetensors"
END = "(end)"  # the first end token, in the list of tokens


@dataclass(frozen=True)
class Explanation:
    """One prompt: ``moved`` is the root mean square over its tokens, relative to their length at the sites.

    ``tokens`` are its tokens with the move of each; the last one is the end token. ``before`` and ``after`` are phrases
    with the distance of the prompt from the same prompt with that phrase, the nearest first.
    """

    prompt: str
    moved: float
    tokens: tuple[tuple[str, float], ...]
    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]


def explain(
    name: str, prompts: Sequence[str] = (), base: str = "", against: Sequence[str] = (), count: int = 3
) -> tuple[Explanation, ...]:
    """Explain ``prompts`` for an edit file, a build, or an edited model ``name``.

    Without prompts, the phrases of the erased concepts and those that they keep. ``base`` is the model before the edit,
    by default that of the build. The phrases to which a prompt is compared are those of the concepts, their goals, what
    they keep, and ``against``; ``count`` of them are given. Raises ErasecError where the base or a concept is not
    known, or nothing that reads text was edited.
    """
    before, after, concepts = _models(name, base)
    phrases = _phrases(concepts, against)
    wanted = tuple(prompts) or phrases
    if not wanted:
        raise ErasecError(f"{name} does not say what it erases", fix="name a prompt: --prompt TEXT")
    stream = next(iter(before.streams))  # the one with a state for each token
    pairs = ((before.weight(site), after.weight(site)) for site in before.streams[stream])
    sums = site_sums(pairs)
    if bool((sums.before == sums.after).all()):
        raise ErasecError(
            f"{name} changes nothing that reads text",
            why="its edit lies in other weights, whose effect only pictures show",
            fix="erasec audit, or the report of the build",
        )
    explanations = tuple(_explain(before, stream, sums, prompt, phrases, count) for prompt in wanted)
    before.release_text_encoders()
    return explanations


def _models(name: str, base: str) -> tuple[Model, Model, tuple[Concept, ...]]:
    """The model before and after the edit, and the concepts that were erased."""
    built = find_built(name)
    path = Path(built.path).expanduser()
    is_edit = path.is_file() and path.suffix == SUFFIX and METADATA in read_header(path)[1]
    edited = None if is_edit else load(built.path)
    origin = base or (built.recipe.model if built.recipe else "")
    if not origin:
        raise ErasecError(f"the base of {name} is not known", fix="name the model before the edit: --base MODEL")
    before = after = load(origin)
    names: list[str] = []
    if edited is None:
        edits, _ = read_edits(path)
        for edit in edits:
            if edit.base and edit.base != before.digest:
                raise ErasecError(f"{path.name} was made for another model than {origin}", fix="give its own: --base")
            after = after.with_edit(edit)
            names += edit.concepts
    elif edited.family != before.family:
        raise ErasecError(f"{name} and {origin} are of different families", fix="give its own base: --base MODEL")
    else:
        after = edited
    known = {concept.name: concept for concept in (built.recipe.concepts if built.recipe else ())}
    names = names or list(built.recipe.erase if built.recipe else ())
    return before, after, tuple(known.get(each) or find(each, world_of(before)) for each in names)


def _phrases(concepts: Sequence[Concept], against: Sequence[str]) -> tuple[str, ...]:
    """What was erased, what it becomes, what is kept, and ``against``, each phrase once. Of the erased ones the longest
    come first: a prompt for "barn owl" is one for that, and not for "owl"."""
    erased = sorted((phrase for concept in concepts for phrase in concept.phrases), key=len, reverse=True)
    goals = [goal for concept in concepts for goal in concept.goals]
    kept = [phrase for concept in concepts for phrase in concept.keep]
    return tuple(dict.fromkeys((*erased, *goals, *kept, *against)))


def _explain(model: Model, stream: str, sums: Sums, prompt: str, phrases: Sequence[str], count: int) -> Explanation:
    spoken = (phrase for phrase in phrases if names_phrase(prompt, phrase) and phrase.lower() in prompt.lower())
    own = next(spoken, "")
    others = [_replaced(prompt, own, phrase) if own else phrase for phrase in phrases]
    tokens = model.encode([prompt, *others], stream)
    states, lasts = tokens.parts[0].double(), tokens.lasts[0].tolist()
    words = _words(model, prompt, stream, lasts[0])
    rows = states[0, lasts[0] + 1 - len(words) : lasts[0] + 2]  # the words, then the first end token
    squares = _squares(sums.before, rows)
    moves = _squares(sums.before - sums.mixed - sums.mixed.T + sums.after, rows).clamp(min=0)
    # Compared are the last word and the first end token, which every prompt has.
    mine, *ends = (states[row, last : last + 2] for row, last in enumerate(lasts))
    unit = _squares(sums.before, mine).sum()
    before, after = [], []
    for end in ends:
        before.append(float((_squares(sums.before, mine - end).sum() / unit).sqrt()))
        mixed = 2 * ((mine @ sums.mixed) * end).sum(1)
        gap = _squares(sums.after, mine) - mixed + _squares(sums.before, end)
        after.append(float((gap.sum() / unit).clamp(min=0).sqrt()))
    shares = (moves / squares).sqrt().tolist()
    return Explanation(
        prompt,
        float((moves.sum() / squares.sum()).sqrt()),
        tuple(zip((*words, END), shares, strict=True)),
        _nearest(phrases, before, count),
        _nearest(phrases, after, count),
    )


def _squares(matrix: Tensor, rows: Tensor) -> Tensor:
    """x^T A x of each row x (n, d) for a matrix A (d, d), (n,)."""
    squares: Tensor = ((rows @ matrix) * rows).sum(1)
    return squares


def _words(model: Model, prompt: str, stream: str, last: int) -> list[str]:
    """The tokens of a prompt up to the one at ``last``, as text, without a start token."""
    part = next(each for each in model.family.streams if each.name == stream).parts[0]
    tokenizer, _ = model.text_encoder(part.encoders[0])
    first = int(model.last_tokens([""], stream)) + 1
    ids = tokenizer(prompt, truncation=True, max_length=last + 2).input_ids[first : last + 1]
    return [token.removesuffix("</w>").replace("\u2581", "") for token in tokenizer.convert_ids_to_tokens(ids)]


def _replaced(prompt: str, phrase: str, other: str) -> str:
    """The prompt with ``other`` in the place of ``phrase``, in any case."""
    return re.sub(re.escape(phrase), lambda _: other, prompt, flags=re.IGNORECASE)


def _nearest(phrases: Sequence[str], distances: Sequence[float], count: int) -> tuple[tuple[str, float], ...]:
    pairs = sorted(zip(phrases, distances, strict=True), key=lambda pair: pair[1])
    return tuple(pairs[:count])
