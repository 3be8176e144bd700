"""Undo: the pass of a recipe is solved again on the published folder, and its matrix is taken off.

A closed-form edit is W' = W M, and M follows from text states and the concept alone, not from W: solved on W' it is the
same M. Its inverse restores W without the base and without an edit file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from erasec import registry
from erasec.audit.changed import Changed, by_name, replaced
from erasec.base import Attempt, Probe, Role, Threat
from erasec.closed_form.base import ClosedForm
from erasec.closed_form.solver import singular_range
from erasec.errors import ErasecError
from erasec.model.edit import Delta, Dense, Edit, LowRank, Remap
from erasec.options import configure, options
from erasec.recipe.concept import find
from erasec.recipe.goals import resolve_goals

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject
    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.recipe.recipe import Recipe

# Trained passes with a closed-form stage: its name, and its options by the names that the pass gives them.
STAGES = {
    "trce": (
        "trce.remap",
        {
            "remap_scale": "scale",
            "remap_keep": "keep",
            "remap_ridge": "ridge",
            "prior": "prior",
            "prior_weight": "prior_weight",
        },
    )
}
SETTLED = 1e-6  # relative change of the restored weights between two rounds below which no further one follows


@dataclass(frozen=True)
class Known:
    """What the recipe gives away: its closed-form ``steps`` in their order, its concepts, and the names of the ``rest``
    of its passes, which cannot be taken off."""

    steps: tuple[ClosedForm, ...]
    concepts: tuple[Concept, ...]
    rest: tuple[str, ...]


def read_recipe(recipe: Recipe | None) -> Known:
    """The closed-form edits of a recipe. Raises ErasecError where the recipe is not known or has none."""
    if recipe is None:
        raise ErasecError(
            "the recipe of the model is not known",
            why="the attacker solves the pass of the recipe again",
            fix="audit the folder of a build, which has a recipe.toml",
        )
    steps, rest = [], []
    for use in recipe.passes:
        name, renamed = STAGES.get(use.name, (use.name, {}))
        given = {renamed.get(key, key): value for key, value in use.options.items() if not renamed or key in renamed}
        step = configure(registry.load_pass(name), given, name)
        if isinstance(step, ClosedForm):
            steps.append(step)
        if name != use.name or not isinstance(step, ClosedForm):
            rest.append(use.name)
    if not steps:
        raise ErasecError(
            f"{' and '.join(rest) or 'the recipe'} cannot be taken off",
            why="the change of the weights follows from a training, not from a matrix that can be solved for again",
            fix="leave out this probe: it is for closed-form passes",
        )
    own = {concept.name: concept for concept in recipe.concepts}
    concepts, _ = resolve_goals(tuple(own.get(name) or find(name) for name in recipe.erase))
    return Known(tuple(steps), concepts, tuple(rest))


def restored(delta: Delta, weight: Tensor, inverse: Callable[[Remap], Tensor]) -> Tensor:
    """The weight (d_out, d_in), float64, before a change: W' M^-1 for W' = W M, else W' less the change."""
    return weight @ inverse(delta) if isinstance(delta, Remap) else weight - delta.change(weight)


def take_off(model: Model, edits: Sequence[Edit], cut: float) -> Model:
    """A view of ``model`` without ``edits``, the last one first.

    Singular values of M below the share ``cut`` of the largest are left out of its inverse; with 0, only those that
    float64 cannot tell from 0.
    """
    weights: dict[Site, Tensor] = {}
    inverses: dict[int, Tensor] = {}  # by id: all sites of an edit share one matrix

    def inverse(remap: Remap) -> Tensor:
        if id(remap) not in inverses:
            inverses[id(remap)] = torch.linalg.pinv(matrix(remap), rtol=cut or None)
        return inverses[id(remap)]

    for edit in reversed(edits):
        for site, delta in edit.deltas.items():
            weight = weights[site] if site in weights else model.weight(site)
            weights[site] = restored(delta, weight, inverse)
    return replaced(model, weights, "undo")


def matrix(remap: Remap) -> Tensor:
    """M = I + left @ right, (d_in, d_in) in float64."""
    left, right = remap.left.double(), remap.right.double()
    return torch.eye(len(left), dtype=torch.float64) + left @ right


def solve_again(known: Known, model: Model, context: Context) -> list[Edit]:
    """The edits of the recipe as they come out on ``model``, in their order."""
    edits = []
    for step in known.steps:
        for edit in step.solve_all(model, known.concepts, context):
            model = model.with_edit(edit)
            edits.append(edit)
    return edits


def undo(model: Model, known: Known, context: Context, cut: float, rounds: int) -> tuple[Model, list[Edit], float]:
    """The model without the edits of the recipe, those edits, and the relative change of the weights in the last round.

    An edit that depends on the weights comes out differently on the edited ones. So it is solved again on the restored
    weights, in ``rounds`` rounds, and each time taken off the published ones: where two rounds give the same weights,
    these lead to the published ones by the recipe.
    """
    edits = solve_again(known, model, context)
    current, change = take_off(model, edits, cut), 0.0
    for _ in range(rounds - 1):
        edits = solve_again(known, current, context)
        following = take_off(model, edits, cut)
        change = distance(following, current)
        current = following
        if change < SETTLED:
            break
    return current, edits, change


def distance(first: Model, second: Model) -> float:
    """The largest relative difference, in the Frobenius norm, of the edited weights of two views."""
    pairs = ((first.weight(site), second.weight(site)) for site in first.edited_sites)
    return max(float((one - other).norm() / other.norm().clamp(min=1e-30)) for one, other in pairs)


def randomised(edit: Edit, rng: Generator) -> Edit:
    """The edit with other matrices of the same size: the change of M keeps its singular values and gets random singular
    vectors, and any other change becomes a random one of the same norm and rank."""
    made: dict[int, Delta] = {}
    deltas: dict[Site, Delta] = {}
    for site, delta in edit.deltas.items():
        if id(delta) not in made:
            made[id(delta)] = _random(delta, rng)
        deltas[site] = made[id(delta)]
    return Edit(deltas, edit.by, edit.concepts, "")


def _random(delta: Delta, rng: Generator) -> Delta:
    if isinstance(delta, Remap):
        rows, columns = (_rotation(len(delta.left), rng) for _ in range(2))
        return Remap(rows @ delta.left.double(), delta.right.double() @ columns)
    if isinstance(delta, LowRank):
        rows, columns = _rotation(len(delta.left), rng), _rotation(delta.right.shape[1], rng)
        return LowRank(rows @ delta.left.double(), delta.right.double() @ columns)
    noise = torch.randn(delta.value.shape, generator=rng, dtype=torch.float64)
    return Dense(noise * (delta.value.double().norm() / noise.norm()))


def _rotation(size: int, rng: Generator) -> Tensor:
    """A random orthogonal matrix (size, size), float64."""
    rotation: Tensor = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64)).Q
    return rotation


@options
class Undo(Probe):
    """The recipe is solved again on the published weights, and its matrices are taken off by their inverses; then
    prompts name the concept. Several edits are taken off in reverse order.

    There are two variants: the inverse, and the pseudo-inverse without the singular values of M below the share ``cut``
    of the largest, which rounding of the published weights may have made useless. The recipe is solved once more on
    what was restored, and that edit is taken off instead, in up to ``rounds`` rounds: it matters where the edit depends
    on the weights. The measured ``last_change`` is 0 where two rounds agree. In the control the matrices are random
    ones of the same size.

    The base is painted as it is: it is what an exact inverse restores. The twin is edited by the recipe before it is
    attacked.
    """

    cut: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    rounds: Annotated[int, Field(ge=2)] = 2

    name: ClassVar[str] = "undo"
    summary: ClassVar[str] = "the recipe is solved again, and its matrix taken off the published weights"
    threat: ClassVar[Threat] = "recipe"
    limits: ClassVar[str] = (
        "It takes closed-form edits off; of a pass that also trains, the trained part stays. An edit that depends on "
        "the weights, as that of rece, is hardly recovered by it."
    )
    references: ClassVar[tuple[Role, ...]] = ("base", "twin")

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        known, model, note = read_recipe(bench.recipe), subject.model, ""
        if subject.role == "base":
            pictures = by_name(bench, subject, self.name)
            yield from (Attempt.single(variant, pictures) for variant, _ in self._variants)
            return
        if subject.role == "twin":
            for edit in solve_again(known, model, subject.context):
                model = model.with_edit(edit)
        if known.rest:
            note = f"not taken off: what {' and '.join(known.rest)} trained"
        for variant, cut in self._variants:
            undone, edits, change = undo(model, known, subject.context, cut, self.rounds)
            measured = {"last_change": change, **_conditions(edits)}
            pictures = by_name(bench, Changed(subject, variant, undone), self.name)
            yield Attempt.single(variant, pictures, measured=measured, note=note)

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        known, rng = read_recipe(bench.recipe), Generator().manual_seed(bench.settings.seed)
        edits = [randomised(edit, rng) for edit in solve_again(known, subject.model, subject.context)]
        for variant, cut in self._variants:
            model = take_off(subject.model, edits, cut)
            yield Attempt.single(variant, by_name(bench, Changed(subject, f"random {variant}", model), self.name))

    @property
    def _variants(self) -> tuple[tuple[str, float], ...]:
        return ("inverse", 0.0), (f"pseudo-inverse, cut {self.cut:g}", self.cut)


def _conditions(edits: Sequence[Edit]) -> dict[str, float]:
    """The smallest and the largest singular value of all matrices M; none where no edit has one."""
    remaps: dict[int, Any] = {
        id(delta): delta for edit in edits for delta in edit.deltas.values() if isinstance(delta, Remap)
    }
    ranges = [singular_range(remap.left.double(), remap.right.double()) for remap in remaps.values()]
    if not ranges:
        return {}
    return {"sigma_min": min(low for low, _ in ranges), "sigma_max": max(high for _, high in ranges)}
