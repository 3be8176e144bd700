"""The null-space family: the acceptance tests of its fact sheet, in small dimensions and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from concepts import STAR
from torch import Tensor

from erasec.base import Context
from erasec.closed_form import null_space, solver
from erasec.closed_form.base import ClosedForm
from erasec.closed_form.null_space import distinct, energy, energy_weights, held_directions
from erasec.closed_form.solver import System, weighted_system
from erasec.model.view import Model
from erasec.passes.cure import Cure
from erasec.passes.double_projection import DoubleProjection
from erasec.passes.speed import Speed
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

WIDTH = 40
HEART = Concept(name="heart", erase=("heart",), anchor="box", keep=("ring",))


def rows(count: int, seed: int) -> Tensor:
    """Rows that share a direction, as text states do: pairwise cosines are about 0.5."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(1, WIDTH, generator=rng, dtype=torch.float64)
    return common + torch.randn(count, WIDTH, generator=rng, dtype=torch.float64)


C, V, K = rows(4, 1), rows(4, 2), rows(9, 3)
NONE = torch.zeros(0, WIDTH, dtype=torch.float64)


def system(source: Tensor = C, target: Tensor = V, weight: float = 1.0) -> System:
    return weighted_system(source, target, torch.full((len(source),), weight), NONE, torch.zeros(0))


def matrix(keep: Tensor, ridge: float, of: System | None = None, hold: float = 0.0) -> Tensor:
    return null_space.solve(of or system(), held_directions(keep, hold), ridge).matrix()


def gap(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_kept_rows_and_their_sums_do_not_move(ridge: float) -> None:
    m = matrix(K, ridge)
    mixed = torch.randn(20, len(K), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ K
    for kept in (K, mixed):
        assert gap(kept @ m.T, kept) < 1e-12
    assert gap(C @ m.T, C) > 0.05  # and others do


def test_without_a_ridge_the_targets_are_reached() -> None:
    assert gap(C @ matrix(K, 0.0).T, V) < 1e-9


def test_what_a_ridge_leaves_follows_from_the_energies() -> None:
    ridge, held = 0.7, held_directions(K, 0.0)
    free = null_space.without(C, held)
    left = ridge * torch.linalg.inv(ridge * torch.eye(len(C), dtype=torch.float64) + free @ free.T)
    assert gap(C @ matrix(K, ridge).T - V, left @ (C - V)) < 1e-10


def test_without_kept_rows_it_is_uce() -> None:
    uce = solver.solve(system(), 0.7, relative=False).matrix()
    assert gap(matrix(NONE, 0.7), uce) < 1e-12
    # A large weight of kept rows tends to the projector.
    heavy = solver.solve(System(C, V - C, K), 0.7, keep_weight=1e4, relative=False).matrix()
    light = solver.solve(System(C, V - C, K), 0.7, keep_weight=1.0, relative=False).matrix()
    assert gap(heavy, matrix(K, 0.7)) < 1e-3 < gap(light, matrix(K, 0.7))


def test_the_ridge_leads_from_double_projections_to_no_edit() -> None:
    unit = torch.eye(WIDTH, dtype=torch.float64)
    assert gap(matrix(K, 1e-9), matrix(K, 0.0)) < 1e-8
    assert gap(matrix(K, 1e9), unit) < 1e-7


def test_an_edit_that_changes_nothing_is_the_identity() -> None:
    for ridge in (0.0, 1.0):
        assert torch.equal(matrix(K, ridge, system(C, C)), torch.eye(WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_state_among_the_kept_ones_is_left_alone_and_its_energy_says_so(ridge: float) -> None:
    inside = K[:2] + K[2:4]
    held = held_directions(K, 0.0)
    assert energy(inside, held) < 1e-12 < energy(C, held)
    assert gap(matrix(K, ridge, system(inside, V[:2])), torch.eye(WIDTH, dtype=torch.float64)) < 1e-6
    # All directions are held: nothing can be erased.
    full = rows(3 * WIDTH, 5)
    assert held_directions(full, 0.0).shape[1] == WIDTH
    assert gap(matrix(full, ridge), torch.eye(WIDTH, dtype=torch.float64)) < 1e-6


def test_editing_twice_changes_nothing_where_the_targets_are_kept() -> None:
    m = matrix(torch.cat([K, V]), 0.0)
    assert gap(m @ m, m) < 1e-9
    assert int(torch.linalg.matrix_rank(torch.eye(WIDTH, dtype=torch.float64) - m, rtol=1e-9)) == len(C)
    free = matrix(K, 0.0)
    assert gap(free @ free, free) > 1e-3  # with targets that may move, it does


def test_order_and_repetition_do_not_count() -> None:
    order = torch.randperm(len(K), generator=torch.Generator().manual_seed(1))
    assert gap(matrix(K[order], 0.5), matrix(K, 0.5)) < 1e-12
    turned = torch.tensor([2, 0, 3, 1])
    assert gap(matrix(K, 0.5, system(C[turned], V[turned])), matrix(K, 0.5)) < 1e-12
    repeated = torch.cat([K, K[:2].repeat(200, 1)])
    assert len(distinct(repeated)) == len(K)
    for hold in (0.0, 0.02):
        assert gap(matrix(distinct(repeated), 0.5, hold=hold), matrix(K, 0.5, hold=hold)) < 1e-12
    # The published rule, a threshold on the mean of all rows, depends on repetitions.
    assert held_directions(repeated, 0.02).shape[1] != held_directions(K, 0.02).shape[1]
    twice = System(torch.cat([C, C]), torch.cat([V, V]) - torch.cat([C, C]), NONE)
    assert gap(matrix(K, 0.5, twice), matrix(K, 0.5, system(weight=2.0))) < 1e-12
    assert gap(matrix(K, 0.0, twice), matrix(K, 0.0)) < 1e-9


def test_rows_with_more_than_their_width_are_their_gram_matrix() -> None:
    many, goals = rows(3 * WIDTH, 7), rows(3 * WIDTH, 8)
    whole = System(many, goals - many, NONE)
    assert gap(matrix(K, 0.5, whole), matrix(K, 0.5, whole.compact())) < 1e-10


def test_concepts_add_up_and_can_be_taken_away_again() -> None:
    one, two = system(C[:2], V[:2]), system(C[2:], V[2:])
    assert gap(matrix(K, 0.5, solver.combine_systems([one, two])), matrix(K, 0.5)) < 1e-12
    assert gap(matrix(K, 0.5, solver.combine_systems([two, one])), matrix(K, 0.5)) < 1e-12
    # The second edit, which also keeps what the first one erased, gives the joint edit.
    first = matrix(K, 0.0, one)
    shift = V[2:] - C[2:] @ first.T
    second = null_space.solve(System(C[2:], shift, NONE), held_directions(torch.cat([K, C[:2]]), 0.0), 0.0)
    joint = first + second.left @ second.right
    assert gap(joint, matrix(K, 0.0)) < 1e-9


def test_it_is_the_formula_of_the_published_code_without_filter_and_augmentation() -> None:
    """W + W (A - T) P (T P + rho I)^-1 with T, A the means of c c^T and v c^T (train_erase_null.py, 88 to 118)."""
    rho, weight = 0.3, torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    held = held_directions(K, 0.0)
    unit = torch.eye(WIDTH, dtype=torch.float64)
    p, t, a = unit - held @ held.T, C.T @ C / len(C), V.T @ C / len(C)
    theirs = weight + weight @ (a - t) @ p @ torch.linalg.inv(t @ p + rho * unit)
    assert gap(weight @ matrix(K, rho, system(weight=1 / len(C))), theirs) < 1e-10


def test_what_a_rule_for_the_rank_lets_go_moves_no_further_than_it_says() -> None:
    held = held_directions(K, 0.03)
    lost = K.shape[0] - held.shape[1]
    assert lost > 0
    solution = null_space.solve(system(), held, 0.0)
    largest = torch.linalg.svdvals(K)[held.shape[1]]
    norm = torch.linalg.matrix_norm(solution.matrix() - torch.eye(WIDTH, dtype=torch.float64), 2)
    assert float((K @ solution.right.T @ solution.left.T).norm(dim=1).max()) <= float(norm * largest) * (1 + 1e-9)


def test_cure_of_one_row_removes_it_and_keeps_what_a_strong_projector_keeps() -> None:
    (direction,), (weight,) = (part.T if part.ndim > 1 else part for part in energy_weights(C[:1], 2.0))
    assert float(weight) == pytest.approx(1.0)
    assert abs(float(direction @ C[0]) / float(C[0].norm())) == pytest.approx(1.0)
    _, shares = energy_weights(K, 2.0)
    _, hard = energy_weights(K, 1e9)
    assert float(shares.min()) < 0.9 and float(hard.min()) > 0.999
    order = torch.randperm(len(K), generator=torch.Generator().manual_seed(2))
    assert gap(energy_weights(K[order], 2.0)[1], shares) < 1e-9
    assert gap(energy_weights(torch.cat([K, K]), 2.0)[1], shares) < 1e-9


def map_of(step: ClosedForm, model: Model, *concepts: Concept) -> Tensor:
    (edit,) = step.solve_all(model, list(concepts), Context())
    delta: Any = next(iter(edit.deltas.values()))
    unit = torch.eye(delta.left.shape[0], dtype=torch.float64)
    moved: Tensor = unit + delta.left @ delta.right
    return moved


PASSES = [Speed(hold=0.0), DoubleProjection(hold=0.0, target="safe"), DoubleProjection(hold=0.0)]


@pytest.mark.parametrize("step", PASSES, ids=["speed", "safe", "anchor"])
def test_passes_hold_what_they_say(step: Any, base: Model) -> None:
    m = map_of(step, base, STAR)
    kept, _ = step.kept_rows(base, STAR, "context")
    assert gap(kept @ m.T, kept) < 1e-8
    source, _ = step.rows_to_erase(base, STAR, "context")
    assert gap(source.double() @ m.T, source.double()) > 1e-3


@pytest.mark.parametrize("step", [Speed(), DoubleProjection(), Cure()], ids=["speed", "double_projection", "cure"])
def test_edits_are_combined_from_their_sums_in_any_order(step: Any, base: Model) -> None:
    alone = [step.solve(base, concept, Context()) for concept in (STAR, HEART)]
    (together,) = step.solve_all(base, [HEART, STAR], Context())
    sums = {name: value for edit in reversed(alone) for name, value in edit.sums.items()}
    combined = step.edit_from_sums(base.streams, sums, base.digest)
    assert combined.deltas.keys() == together.deltas.keys()
    for site, delta in together.deltas.items():
        weight = base.stored_weight(site)
        assert torch.equal(combined.deltas[site].change(weight), delta.change(weight))
    # The stats name the concept that can be erased least.
    assert together.stats["energy"] == pytest.approx(
        min(energy(sums[name]["context.source"], step.held("context", sums)) for name in ("star", "heart"))
    )


def test_a_concept_that_is_like_what_is_kept_is_named(base: Model, capsys: pytest.CaptureFixture[str]) -> None:
    close = Concept(name="star", erase=("star",), anchor="circle", keep=("stars", "square", "a star sign"))
    Speed(hold=0.0).solve(base, close, Context())
    assert "star: only" in capsys.readouterr().err
    Speed(hold=0.1).solve(base, close, Context())  # so little is held that most of it is free
    assert "star: only" not in capsys.readouterr().err


def test_fewer_free_directions_than_concepts_are_said(base: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """rank(K) + n > d: all states of ten prompts and of the empty one span 127 of 128 directions."""
    words = ("ring", "arrow", "cross", "crescent", "diamond", "box", "donut", "sickle", "hoop", "valentine")
    concepts = [STAR.model_copy(update={"keep": words, "templates": ("{}", "a {}", "a red {}")}), HEART]
    (edit,) = Speed(hold=0.0, rows="tail").solve_all(base, concepts, Context())
    assert edit.stats["free"] <= 1
    assert "directions of the text states are left for 2 concepts" in capsys.readouterr().err
    (edit,) = Speed().solve_all(base, concepts, Context())
    assert edit.stats["free"] > 2
    assert "directions of the text states are left" not in capsys.readouterr().err


def test_matrices_chooses_keys_and_values(base: Model) -> None:
    projections = {
        chosen: {site.proj for site in Uce(matrices=chosen).solve(base, STAR, Context()).deltas}  # type: ignore[arg-type]
        for chosen in ("kv", "k", "v")
    }
    assert projections == {"kv": {"k", "v"}, "k": {"k"}, "v": {"v"}}
    assert {site.proj for site in Speed().sites(base)} == {"v"}


def test_adding_concepts_does_not_weaken_the_others(base: Model) -> None:
    """With the published weights of 1/n, the same ridge leaves more of each concept, the more there are."""
    alone = Speed(hold=0.0).solve(base, STAR, Context())
    (both,) = Speed(hold=0.0).solve_all(base, [STAR, HEART], Context())
    assert both.stats["ridge"] == pytest.approx(alone.stats["ridge"], rel=0.05)
