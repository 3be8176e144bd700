"""Goals of several concepts that are erased together: none of them may lead to a phrase that is erased as well."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache

from erasec.errors import ErasecError
from erasec.progress import note
from erasec.recipe.concept import Concept

# What to do about a concept that becomes itself.
ANOTHER_GOAL = "give the concept another anchor, or none: its prompts then become the empty prompt"


def names_phrase(text: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` occur in ``text`` one after another, in any case: "star" in "a red Star"."""
    return _words(phrase) in _words(text)


def first_disputed(goals: Iterable[str], erased: Collection[str]) -> str:
    """The first of the goals that names an erased phrase; "" if none does."""
    return next((goal for goal in goals if any(names_phrase(goal, phrase) for phrase in erased)), "")


def recorded_goals(record: Mapping[str, Sequence[str]], name: str) -> Sequence[str]:
    """The goals of the concept ``name`` in the ``record`` that an edit has of it.

    Older edits and those of some passes have none; stderr then says that the goals were not compared.
    """
    if "goals" not in record:
        note(f"the edit of {name} does not say what {name} becomes: this was not compared with what is erased too")
    return record.get("goals", ())


@lru_cache(1 << 15)  # a list of names has thousands of phrases, each compared with every goal
def _words(text: str) -> str:
    text = unicodedata.normalize("NFC", text.casefold())  # as the tokenizers of CLIP do
    return " " + " ".join(re.findall(r"\w+|[^\w\s]", text)) + " "


def resolve_goals(
    concepts: Sequence[Concept], earlier: Sequence[Concept] = ()
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """The concepts with anchors and counterparts that stay, and one sentence for each that is replaced.

    ``earlier`` are concepts that were erased from the model before. A goal that names an erased phrase is replaced by
    the goal of that phrase, and so on, until one stays. If the goals lead back to each other, a counterpart gives way
    to its concept's anchor, and an anchor to the first ``fallback`` that stays, or to the empty prompt, at which every
    pass can aim. Resolved concepts stay as they are. Raises ErasecError for a concept whose own goal names it: no other
    concept is the cause, so its file is wrong.
    """
    erased = (*concepts, *earlier)

    @cache  # many concepts have the same goals
    def erased_phrase(goal: str) -> tuple[Concept, str] | None:
        return _erased_phrase(goal, erased)

    resolved, notes = [], []
    for concept in concepts:
        anchor = _goal_that_stays(concept, concept.anchor, erased_phrase)
        if concept.anchor and not anchor:
            anchor = next((phrase for phrase in concept.fallback if not erased_phrase(phrase)), "")
        counterparts = {phrase: _goal_that_stays(concept, goal, erased_phrase) for phrase, goal in concept.counterparts}
        replaced = [("the anchor", concept.anchor, anchor)]
        replaced += [
            (f"the counterpart of {phrase!r}", goal, counterparts[phrase] or anchor)
            for phrase, goal in concept.counterparts
        ]
        notes += [_note(concept, what, old, new, earlier) for what, old, new in replaced if new != old]
        kept = tuple((phrase, goal) for phrase, goal in counterparts.items() if goal)
        resolved.append(concept.model_copy(update={"anchor": anchor, "counterparts": kept}))
    return tuple(resolved), tuple(notes)


def _goal_that_stays(concept: Concept, goal: str, erased_phrase: Callable[[str], tuple[Concept, str] | None]) -> str:
    """``goal``, or the first one after it that names no erased phrase; "" if there is none. ``erased_phrase`` finds the
    erased phrase that a goal names, with its concept."""
    passed: list[tuple[Concept, str]] = []
    while goal and (erased := erased_phrase(goal)):
        if erased in passed:
            if all(owner is concept for owner, _ in passed):
                raise ErasecError(
                    f"the concept {concept.name} becomes itself",
                    why=f"its anchor or counterpart {goal!r} names {erased[1]!r}, which it erases",
                    fix=ANOTHER_GOAL,
                )
            return ""
        passed.append(erased)
        owner, phrase = erased
        goal = owner.goal(phrase)
    return goal


def _erased_phrase(goal: str, concepts: Sequence[Concept]) -> tuple[Concept, str] | None:
    """The longest erased phrase that a goal names, with the first concept that erases it."""
    named = [(concept, phrase) for concept in concepts for phrase in concept.phrases if names_phrase(goal, phrase)]
    return max(named, key=lambda item: len(item[1]), default=None)


def _note(concept: Concept, what: str, old: str, new: str, earlier: Sequence[Concept]) -> str:
    reason = "which was erased from this model before" if _erased_phrase(old, earlier) else "which is erased too"
    reason += "" if new else ", as is everything that it would become"
    return f"{concept.name}: {what} is {repr(new) if new else 'the empty prompt'} instead of {old!r}, {reason}."
