"""How close kept phrases lie to erased ones: angles around a centre, for each erased phrase the nearest kept one."""

from __future__ import annotations

import math

import pytest

from erasec.closed_form.apart import closest_pairs
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.recipe.concept import Concept, find


@pytest.fixture(scope="module")
def emoji() -> Model:
    return load("emoji")


def test_the_nearest_kept_phrase_of_each_erased_one_comes_first(emoji: Model) -> None:
    oak = Concept(name="oak", erase=("oak",), synonyms=("leafy tree",), keep=("pine", "drum", "laptop"))
    pairs = closest_pairs(emoji, [oak])
    assert {pair.erased: pair.kept for pair in pairs} == {"oak": "pine", "leafy tree": "pine"}
    assert [pair.angle for pair in pairs] == sorted(pair.angle for pair in pairs)
    far = closest_pairs(emoji, [oak.model_copy(update={"keep": ("drum", "laptop")})])
    assert min(pair.angle for pair in far) > max(pair.angle for pair in pairs) + 5


def test_a_phrase_that_is_erased_and_kept_has_no_angle(emoji: Model) -> None:
    same = Concept(name="a", erase=("oak",), keep=("an oak",))
    assert closest_pairs(emoji, [same])[0].angle < 30
    both = [Concept(name="a", erase=("oak",), keep=("pine", "Drum")), Concept(name="b", erase=("drum",))]
    assert [(pair.concept, pair.erased, pair.kept) for pair in closest_pairs(emoji, both)] == [
        ("a", "oak", "pine"),
        ("b", "drum", "pine"),
    ]
    assert closest_pairs(emoji, [Concept(name="a", erase=("oak",))]) == ()


def test_the_angles_do_not_depend_on_what_else_is_asked(emoji: Model) -> None:
    """The centre is mostly that of everyday words, so that further concepts move the angles by little."""
    owl = find("owl", "emoji")
    alone = {pair.erased: pair.angle for pair in closest_pairs(emoji, [owl])}
    others = [find(name, "emoji") for name in ("piano", "lemon", "car")]
    beside = {pair.erased: pair.angle for pair in closest_pairs(emoji, [owl, *others])}
    assert all(math.isclose(alone[phrase], beside[phrase], abs_tol=6) for phrase in alone)
