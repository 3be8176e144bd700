"""The algebraic undo: what a recipe gives away is taken off, and what has no inverse stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from erasec.audit.changed import replaced
from erasec.audit.subject import Subject
from erasec.audit.undo import (
    Known,
    Undo,
    distance,
    matrix,
    randomised,
    read_recipe,
    solve_again,
    take_off,
    undo,
)
from erasec.base import Context
from erasec.closed_form.base import ClosedForm
from erasec.errors import ErasecError
from erasec.model.edit import Edit, LowRank, Remap
from erasec.model.view import Model
from erasec.passes.trce import Remap as TrceRemap
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import from_toml

CONCEPT = Concept(name="star", erase=("star",), anchor="circle", keep=("square", "heart"), templates=("{}", "a {}"))


def published(model: Model, edits: Sequence[Edit]) -> Model:
    """A view whose weights are those of ``model`` with the edits, rounded as float32 files hold them."""
    for edit in edits:
        model = model.with_edit(edit)
    rounded = {site: model.weight(site).float() for site in model.edited_sites}
    return replaced(model.original, rounded, "file")


def error(model: Model, original: Model) -> float:
    """The largest relative difference of the edited weights from those of ``original``."""
    return distance(model, original)


def known_map(width: int, smallest: float = 0.1) -> Remap:
    """M = I + left @ right with singular values 1 and, in one direction, ``smallest``."""
    row = torch.nn.functional.normalize(torch.ones(1, width, dtype=torch.float64))
    return Remap((smallest - 1) * row.T, row)


def cross(model: Model, delta: Any) -> Edit:
    return Edit(dict.fromkeys(model.select("cross", "kv"), delta), "hand", ("star",), "")


def test_a_known_map_is_taken_off(base: Model) -> None:
    edit = cross(base, known_map(base.select("cross", "kv")[0].shape[1]))
    model = published(base, [edit])
    assert error(model, base) > 1e-3
    assert error(take_off(model, [edit], 0.0), base) < 1e-4


def test_a_projector_has_nothing_to_take_back(base: Model) -> None:
    width = base.select("cross", "kv")[0].shape[1]
    edit = cross(base, known_map(width, smallest=0.0))
    model = published(base, [edit])
    lost = error(model, base)
    # With a cut, the direction that was projected out stays zero.
    assert error(take_off(model, [edit], 1e-6), base) == pytest.approx(lost, rel=1e-4)
    assert error(take_off(model, [edit], 0.0), base) > 0.5 * lost


def test_edits_are_taken_off_in_reverse_order(base: Model) -> None:
    width = base.select("cross", "kv")[0].shape[1]
    first, second = cross(base, known_map(width)), cross(base, _sheared(width))
    model = published(base, [first, second])
    assert error(take_off(model, [first, second], 0.0), base) < 1e-4
    assert error(take_off(model, [second, first], 0.0), base) > 1e-3


def test_a_change_that_was_added_is_subtracted(base: Model) -> None:
    site = base.select("cross", "kv")[0]
    left, right = torch.ones(site.shape[0], 1), torch.ones(1, site.shape[1])
    edit = Edit({site: LowRank(left, right)}, "hand", ("star",), "")
    assert error(take_off(published(base, [edit]), [edit], 0.0), base) < 1e-4


@pytest.mark.parametrize("steps", [(Uce(),), (Uce(), TrceRemap())])
def test_the_recipe_leads_back_from_the_published_weights(base: Model, steps: tuple[ClosedForm, ...]) -> None:
    known, context = Known(steps, (CONCEPT,), ()), Context()
    model = published(base, solve_again(known, base, context))
    assert error(model, base) > 1e-2
    undone, edits, change = undo(model, known, context, 0.0, 3)
    assert len(edits) == len(steps)
    assert error(undone, base) < 1e-4
    assert change < 1e-6
    guessed = Concept(name="star", erase=("circle",), anchor="star", templates=("{}",))
    other, _, _ = undo(model, Known(steps, (guessed,), ()), context, 0.0, 1)
    assert error(other, base) > 1e-2  # another recipe leads elsewhere


@dataclass(frozen=True)
class Scaled(Uce):
    """A pass whose edit depends on the weights: M = (1 + |W'| / 2) I, relative to those of ``SIZE``."""

    SIZE: ClassVar[float] = 0.0

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        sites = model.select("cross", "kv")
        size = sum(float(model.weight(site).norm()) for site in sites) / self.SIZE
        identity = torch.eye(sites[0].shape[1], dtype=torch.float64)
        yield cross(model, Remap(0.5 * size * identity, identity))


def test_an_edit_that_depends_on_the_weights_is_solved_again_on_what_was_restored(
    base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = base.select("cross", "kv")
    monkeypatch.setattr(Scaled, "SIZE", sum(float(base.weight(site).norm()) for site in sites))
    known, context = Known((Scaled(),), (CONCEPT,), ()), Context()
    model = published(base, solve_again(known, base, context))
    errors = [error(undo(model, known, context, 0.0, rounds)[0], base) for rounds in (1, 2, 12)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_a_random_map_has_the_size_of_the_real_one(base: Model) -> None:
    edit = cross(base, _sheared(base.select("cross", "kv")[0].shape[1]))
    made = randomised(edit, torch.Generator().manual_seed(0))
    deltas = set(map(id, made.deltas.values()))
    assert len(deltas) == 1  # one matrix for all sites, as in the edit
    real, random = (matrix(next(iter(one.deltas.values()))) for one in (edit, made))  # type: ignore[arg-type]
    identity = torch.eye(len(real), dtype=torch.float64)
    sizes = [torch.linalg.svdvals(change - identity) for change in (real, random)]
    assert torch.allclose(*sizes, atol=1e-9)
    assert not torch.allclose(real, random, atol=1e-2)


def test_a_recipe_says_what_can_be_taken_off() -> None:
    def read(*passes: str) -> Known:
        tables = "".join(f'[[pass]]\nname = "{name}"\n' for name in passes)
        return read_recipe(from_toml(f'model = "glyphs"\nerase = ["star"]\n{tables}'))

    known = read("uce", "esd")
    assert [step.name for step in known.steps] == ["uce"]
    assert known.rest == ("esd",)
    assert [concept.name for concept in known.concepts] == ["star"]
    options = "[pass.options]\nremap_ridge = 0.5\nsteps = 3\n"
    known = read_recipe(from_toml(f'model = "glyphs"\nerase = ["star"]\n[[pass]]\nname = "trce"\n{options}'))
    assert [(step.name, step.ridge) for step in known.steps] == [("trce.remap", 0.5)]
    assert known.rest == ("trce",)
    for passes in (("esd",), ("kpop",), ("esd", "kpop")):
        with pytest.raises(ErasecError, match="cannot be taken off") as caught:
            read(*passes)
        assert "training" in caught.value.why
    with pytest.raises(ErasecError, match="not known"):
        read_recipe(None)


def test_attack_and_control_have_the_same_variants_and_leave_the_subject_as_it_is(base: Model) -> None:
    recipe = from_toml('model = "glyphs"\nerase = ["star"]\n[[pass]]\nname = "uce"\n').model_copy(
        update={"concepts": (CONCEPT,)}
    )
    bench: Any = SimpleNamespace(
        recipe=recipe,
        settings=SimpleNamespace(images=1, steps=1, guidance=1.0, seed=0),
        prompts=lambda group: ["a star"],
        seeds=lambda purpose, count: list(range(count)),
    )
    known = read_recipe(recipe)
    model = published(base, solve_again(known, base, Context()))
    subject = Subject("model", model, Context())
    before = subject.pictures(["a star"], [0], 1, 1.0)
    attack, control = list(Undo().attack(bench, subject)), list(Undo().control(bench, subject))
    assert [attempt.variant for attempt in attack] == [attempt.variant for attempt in control]
    assert attack[0].variant == "inverse"
    assert attack[0].measured["sigma_min"] < 1 < attack[0].measured["sigma_max"]
    original = Subject("base", base, Context())
    plain = original.pictures(["a star"], [0], 1, 1.0)
    # The inverse paints what the base paints, to the rounding of pictures; the random one does not.
    assert abs(attack[0].pictures[:, 0].astype(int) - plain.astype(int)).max() <= 1
    assert abs(control[0].pictures[:, 0].astype(int) - plain.astype(int)).max() > 1
    assert (subject.pictures(["a star"], [0], 1, 1.0) == before).all()
    twin = list(Undo().attack(bench, Subject("twin", base, Context())))
    assert abs(twin[0].pictures[:, 0].astype(int) - plain.astype(int)).max() <= 1
    assert (next(Undo().attack(bench, original)).pictures[:, 0] == plain).all()


def _sheared(width: int) -> Remap:
    """A map that is not symmetric and has a well-conditioned inverse."""
    left, right = torch.zeros(width, 1, dtype=torch.float64), torch.zeros(1, width, dtype=torch.float64)
    left[0], right[0, 1] = 2.0, 1.0
    return Remap(left, right)
