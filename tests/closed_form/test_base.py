"""The base class of closed-form passes: several concepts in one system, their conflicts and their scales."""

from __future__ import annotations

import torch
from concepts import STAR

from erasec.base import Context
from erasec.closed_form.token_rows import row_pairs
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept


def test_keep_phrases_that_another_concept_erases_are_dropped(model: Model) -> None:
    circle = Concept(name="circle", erase=("Circle",), anchor="square", keep=("ring",))
    star = STAR.model_copy(update={"keep": ("circle", "ring")})
    edit = next(Uce().solve_all(model, [star, circle], Context()))
    assert edit.phrases["star"]["keep"] == ["ring"]
    assert Uce().solve(model, star, Context()).phrases["star"]["keep"] == ["circle", "ring"]


def test_concepts_are_solved_together_in_any_order(model: Model) -> None:
    heart = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))
    first, second = (next(Uce().solve_all(model, order, Context())) for order in ([STAR, heart], [heart, STAR]))
    assert first.concepts == second.concepts == ("heart", "star")
    for site in first.deltas:
        weight = model.stored_weight(site)
        assert torch.equal(first.deltas[site].change(weight), second.deltas[site].change(weight))
    alone = Uce().solve(model.with_edit(Uce().solve(model, STAR, Context())), heart, Context())
    assert not torch.allclose(alone.deltas[site].change(weight), first.deltas[site].change(weight))


def test_a_concepts_scale_moves_it_nearer_to_its_goal(model: Model) -> None:
    heart = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))
    heavy = heart.model_copy(update={"scale": 100.0})
    unit = torch.eye(128, dtype=torch.float64)

    def gap(concept: Concept) -> float:
        edit = next(Uce().solve_all(model, [STAR, concept], Context()))
        rows, becomes = row_pairs(model, concept.prompts(["heart"]), concept.prompts(["box"]), "tail", "context")
        matrix = unit + next(iter(edit.deltas.values())).change(unit)
        return float((rows.double() @ matrix.T - becomes).norm())

    assert gap(heavy) < 0.5 * gap(heart)


def test_many_concepts_are_named_before_anything_is_solved(model: Model) -> None:
    many = [Concept(name=f"a{number}", erase=(f"a{number}",)) for number in range(20)]
    (sentence,) = Uce().notes(model, many)
    assert sentence.startswith("uce erases 20 concepts in one map of text states that are 128 wide")
    assert Uce().notes(model, many[:5]) == ()
