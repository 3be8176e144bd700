"""Phrases and prompts that are longer than what a model's text encoders read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from erasec.errors import ErasecError

if TYPE_CHECKING:
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

WORDS = 4  # words that a message shows before a cut
SHOWN = 40  # characters of a phrase that a message shows


def check_lengths(concepts: Sequence[Concept], model: Model) -> list[str]:
    """A sentence for each phrase or implicit prompt of which a text encoder reads only the beginning.

    Raises ErasecError where no text encoder reads all of a phrase to erase, or of its goal, in any template: the edit
    would be that of another concept, which the words before the cut describe.
    """
    return [note for concept in concepts for note in _notes(concept, model)]


def _notes(concept: Concept, model: Model) -> Iterator[str]:
    groups = (("phrase", concept.phrases), ("goal", concept.goals), ("kept phrase", concept.keep))
    for what, phrase in ((what, phrase) for what, phrases in groups for phrase in phrases):
        prompts = [(prompt, model.text_read(prompt.text)) for prompt in concept.prompts([phrase])]
        cuts = [cut for prompt, read in prompts if (cut := where_cut(read, prompt.text))]
        name = f"{concept.name}: the {what} {shorten(phrase)!r}"
        lost = all(len(part) < len(prompt.upto) for prompt, read in prompts for part in read.values())
        if lost and what != "kept phrase":
            raise ErasecError(
                f"{name} is too long",
                why=f"{cuts[0]}; words after that would not count",
                fix="name the concept in fewer words",
            )
        if cuts:
            yield f"{name} is cut: {cuts[0]}."
    for prompt in concept.implicit:
        if cut := where_cut(model.text_read(prompt), prompt):
            yield f"{concept.name}: the implicit prompt {shorten(prompt)!r} is cut: {cut}."


def where_cut(read: dict[str, str], text: str) -> str:
    """Which text encoder reads only the beginning of ``text``, and where it stops; "" if all read the whole text.

    ``read`` is the part that each text encoder reads.
    """
    for encoder, part in read.items():
        if len(part.rstrip()) < len(text.rstrip()):
            return f"{encoder} reads it up to {' '.join(part.split()[-WORDS:])!r}"
    return ""


def shorten(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}..."
