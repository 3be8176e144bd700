"""A concept for tests that need all fields of one."""

from __future__ import annotations

from erasec.recipe.concept import Concept

STAR = Concept(
    name="star",
    erase=("star", "five-pointed spark"),
    anchor="circle",
    keep=("square", "ring"),
    counterparts=(("five-pointed spark", "round dot"),),
    templates=("{}", "a {} on navy"),
)
