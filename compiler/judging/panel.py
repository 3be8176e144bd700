"""The questions about a concept on any model: prompts from the concept's own phrases, templates and lists."""

from __future__ import annotations

import zlib
from collections import Counter
from itertools import cycle, islice
from typing import TYPE_CHECKING

from erasec.base import Question

if TYPE_CHECKING:
    from collections.abc import Sequence

    from erasec.recipe.concept import Concept


def questions(concept: Concept, images: int, seed: int, label: str = "") -> tuple[Question, ...]:
    """Questions by name, by synonym, by implicit prompt and about kept phrases, ``images`` for each group.

    ``label`` is what a judge looks for in pictures of the concept; "" if no judge can see it. Kept phrases have no
    label. Phrases and templates alternate, so that a few pictures already show several of both. The seed of a picture
    follows from its prompt, so that two concepts that keep the same phrase share the picture of the base.
    """
    rows = [("name", text, label) for text in _alternate(concept, concept.erase, images)]
    rows += [("synonym", text, label) for text in _alternate(concept, concept.synonyms, images)]
    rows += [("implicit", text, label) for text in islice(cycle(concept.implicit), images)]
    rows += [("keep", text, "") for text in _alternate(concept, concept.keep, images)]
    occurrences = Counter[str]()
    result = []
    for group, text, looked_for in rows:
        own = (zlib.crc32(text.encode()) + occurrences[text]) % 1_000_003
        occurrences[text] += 1
        result.append(Question(group, text, seed * 1_000_003 + own, looked_for))
    return tuple(result)


def _alternate(concept: Concept, phrases: Sequence[str], count: int) -> list[str]:
    """``count`` prompts of the phrases in the concept's templates, phrase after phrase, in changing templates."""
    if not phrases:
        return []
    size = len(concept.templates)
    prompts = [prompt.text for prompt in concept.prompts(phrases)]
    chosen = ((index % len(phrases), (index // len(phrases) + index % len(phrases)) % size) for index in range(count))
    return [prompts[phrase * size + template] for phrase, template in chosen]
