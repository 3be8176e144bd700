"""Goals: none leads to what is erased with it, and each that is replaced is said."""

from __future__ import annotations

import pytest

from erasec.errors import ErasecError
from erasec.recipe.concept import Concept, from_file, library
from erasec.recipe.goals import names_phrase, resolve_goals


def concept(name: str, anchor: str, **more: object) -> Concept:
    return Concept.model_validate({"name": name, "erase": [name], "anchor": anchor, **more})


def anchors(*concepts: Concept, earlier: tuple[Concept, ...] = ()) -> list[str]:
    return [item.anchor for item in resolve_goals(concepts, earlier)[0]]


STAR, CIRCLE, SQUARE = concept("star", "circle"), concept("circle", "square"), concept("square", "circle")


def test_a_chain_is_followed_to_a_goal_that_stays() -> None:
    assert anchors(STAR, CIRCLE) == ["square", "square"]
    assert anchors(concept("star", "a red Circle"), CIRCLE) == ["square", "square"]
    assert anchors(STAR, earlier=(CIRCLE,)) == ["square"]


def test_goals_that_lead_back_become_the_fallback_or_the_empty_prompt() -> None:
    assert anchors(CIRCLE, SQUARE) == ["", ""]
    assert anchors(STAR, CIRCLE, SQUARE) == ["", "", ""]
    assert anchors(SQUARE, earlier=(CIRCLE,)) == [""]
    beside = CIRCLE.model_copy(update={"fallback": ("square tile", "triangle", "cross")})
    assert anchors(beside, SQUARE) == ["triangle", ""]
    assert anchors(beside, SQUARE, concept("triangle", "")) == ["cross", "", ""]


def test_a_counterpart_gives_way_to_its_anchor() -> None:
    cat = concept("cat", "dog", synonyms=["kitten", "lion"], counterparts={"kitten": "puppy", "lion": "tiger"})
    (resolved, _), notes = resolve_goals((cat, concept("tiger", "lion")))
    assert [resolved.goal(phrase) for phrase in cat.phrases] == ["dog", "puppy", "dog"]
    assert "cat: the counterpart of 'lion' is 'dog' instead of 'tiger', which is erased too." in notes


def test_each_replacement_is_said_and_nothing_else() -> None:
    assert resolve_goals((STAR, CIRCLE))[1] == (
        "star: the anchor is 'square' instead of 'circle', which is erased too.",
    )
    (note,) = resolve_goals((SQUARE,), (CIRCLE,))[1]
    assert "the empty prompt instead of 'circle', which was erased from this model before, as is everything" in note


def test_goals_that_stay_are_left_alone() -> None:
    starfish = concept("starfish", "circles", fallback=["ring"])
    unnamed = concept("moon", "")
    assert resolve_goals((starfish, unnamed, CIRCLE)) == ((starfish, unnamed, CIRCLE), ())
    resolved, _ = resolve_goals((STAR, CIRCLE, SQUARE))
    assert resolve_goals(resolved) == (resolved, ())
    for path in (*library().values(), *library("glyphs").values()):
        assert resolve_goals((from_file(path),)) == ((from_file(path),), ())


@pytest.mark.parametrize("anchor", ["star", "a Star", "hexagram"])
def test_a_concept_that_becomes_itself_is_an_error(anchor: str) -> None:
    with pytest.raises(ErasecError, match="the concept star becomes itself") as caught:
        resolve_goals((concept("star", anchor, synonyms=["hexagram"]),))
    assert "another anchor" in caught.value.fix


def test_every_subset_of_the_small_world_has_goals_that_stay() -> None:
    shapes = [from_file(path) for path in library("glyphs").values() if path.parent.name == "glyphs"]
    for first in shapes:
        for second in shapes:
            if first.name < second.name:
                pair, _ = resolve_goals((first, second))
                assert not {goal for item in pair for goal in item.goals} & {*first.phrases, *second.phrases, ""}


def test_words_are_compared_whole() -> None:
    assert names_phrase("a CAFE\u0301", "caf\u00e9")  # one character or two, CLIP reads the same
    assert names_phrase("a red Star, painted", "star")
    assert names_phrase("an X-rated scene", "x-rated")
    assert not names_phrase("starfish", "star")
    assert not names_phrase("a star", "a red star")
