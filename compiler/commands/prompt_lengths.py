"""Phrases, prompts, options and captions that are longer than what a model's text encoders read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.model.cuts import shorten, where_cut

if TYPE_CHECKING:
    from erasec.base import Pass
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


def check_lengths(concepts: Sequence[Concept], model: Model) -> list[str]:
    """A sentence for each phrase or implicit prompt of which a text encoder reads only the beginning.

    Raises ErasecError where no text encoder reads all of a phrase to erase, or of its goal, in any template: the edit
    would be that of another concept, which the words before the cut describe.
    """
    return [note for concept in concepts for note in _notes(concept, model)]


def check_options(passes: Sequence[Pass], model: Model) -> list[str]:
    """A sentence for each prompt in an option of a pass of which a text encoder reads only the beginning.

    Raises ErasecError where no text encoder reads all of it.
    """
    notes = []
    for step in passes:
        for option in sorted(step.prompt_options):
            text, name = getattr(step, option), f"{step.name}: the option {option}"
            read = model.text_read(text)
            cut = where_cut(read, text)
            if cut and all(len(part.rstrip()) < len(text.rstrip()) for part in read.values()):
                raise _too_long(name, cut, "give fewer words")
            notes += [f"{name} is cut: {cut}."] if cut else []
    return notes


def _too_long(name: str, cut: str, fix: str) -> ErasecError:
    return ErasecError(f"{name} is too long", why=f"{cut}; words after that would not count", fix=fix)


def _notes(concept: Concept, model: Model) -> Iterator[str]:
    groups = (("phrase", concept.phrases), ("goal", concept.goals), ("kept phrase", concept.keep))
    for what, phrase in ((what, phrase) for what, phrases in groups for phrase in phrases):
        prompts = [(prompt, model.text_read(prompt.text)) for prompt in concept.prompts([phrase])]
        cuts = [cut for prompt, read in prompts if (cut := where_cut(read, prompt.text))]
        name = f"{concept.name}: the {what} {shorten(phrase)!r}"
        lost = all(len(part) < len(prompt.upto) for prompt, read in prompts for part in read.values())
        if lost and what != "kept phrase":
            raise _too_long(name, cuts[0], "name the concept in fewer words")
        if cuts:
            yield f"{name} is cut: {cuts[0]}."
    for prompt in concept.implicit:
        if cut := where_cut(model.text_read(prompt), prompt):
            yield f"{concept.name}: the implicit prompt {shorten(prompt)!r} is cut: {cut}."
