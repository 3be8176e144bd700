"""How the names of concepts were understood: one sentence for all names that were understood in the same way.

A list of names may have hundreds of lines, and a sentence for each of them would hide every other note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from erasec.errors import suggestion, words
from erasec.recipe import concept as concept_library

if TYPE_CHECKING:
    from erasec.recipe.concept import Concept

QUOTED = 3  # names that a sentence quotes


def understood(names: Iterable[str], concepts: Iterable[Concept], own: set[str], world: str) -> tuple[str, ...]:
    """Sentences about names that are a bundled concept and a phrase: ``names`` as the recipe has them, and the concepts
    that they became. Names of ``own``, the concepts of the recipe, and of files of the model's ``world`` mean one thing
    alone."""
    as_concepts: dict[tuple[str, int, str], list[str]] = {}
    as_phrases: dict[tuple[str, ...], list[str]] = {}
    for name, concept in zip(names, concepts, strict=True):
        path = None if name in own else concept_library.bundled_file(name, world)
        if name in own or (path and path.parent.name == world):
            continue
        if path is not None:
            as_concepts.setdefault((path.stem, len(concept.phrases), concept.anchor), []).append(name)
        elif elsewhere := _worlds_with(name):
            as_phrases.setdefault(tuple(elsewhere), []).append(name)
    return (*_sentences_of_concepts(as_concepts), *_sentences_of_phrases(as_phrases))


def _sentences_of_concepts(groups: Mapping[tuple[str, int, str], Sequence[str]]) -> Iterable[str]:
    for (stem, count, anchor), names in groups.items():
        one = len(names) == 1
        yield (
            f"{_quoted(names)} {'is' if one else 'are'} taken as the bundled concept {stem} ({count} phrases, anchor "
            f"{anchor!r}); for the phrase alone, write a concept file with that phrase."
        )


def _sentences_of_phrases(groups: Mapping[tuple[str, ...], Sequence[str]]) -> Iterable[str]:
    for places, names in groups.items():
        models = f"only for models of {' and '.join(places)}"
        if len(names) == 1:
            yield (
                f"{_quoted(names)} is taken as a phrase, with no synonyms and no anchor: the bundled concept of this "
                f"name is {models}."
            )
        else:
            yield (
                f"{_quoted(names)} are taken as phrases, with no synonyms and no anchors: the bundled concepts of "
                f"these names are {models}."
            )


def without_file(concepts: Iterable[Concept], world: str) -> tuple[str, ...]:
    """A sentence about the concepts that no file describes, and which may be misspelt."""
    bundled = [*concept_library.library(world)]
    names = [
        concept.name
        for concept in concepts
        if bundled and concept == concept_library.from_phrase(concept.name)
        if not (concept_library.bundled_file(concept.name) or _worlds_with(concept.name))
    ]
    if len(names) == 1:
        return (
            f"no concept file is named {names[0]!r}: the phrase itself is erased, with no synonyms and no anchor; "
            + suggestion(names[0], bundled),
        )
    if not names:
        return ()
    return (
        f"no concept files are named {_quoted(names)}: the phrases themselves are erased, with no synonyms and no "
        "anchors; erasec list concepts names the files, and a pattern such as celebrity:names.txt gives the names of a "
        "list synonyms and an anchor",
    )


def _worlds_with(name: str) -> list[str]:
    return [place for place in concept_library.worlds() if concept_library.bundled_file(name, place)]


def _quoted(names: Sequence[str]) -> str:
    further = [f"{len(names) - QUOTED} more"] if len(names) > QUOTED else []
    return words([*map(repr, names[:QUOTED]), *further])
