"""What published codes of the null-space family get wrong, as small copies of them that fail, beside ours that hold.

The formulas are those of SPEED (train_erase_null.py) and of Double Projections, in small dimensions. The rows have the
length of the text states of Stable Diffusion 1, so that thresholds and ridges mean what they mean there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from concepts import STAR
from torch import Tensor

from erasec.base import Context
from erasec.closed_form import null_space, solver
from erasec.closed_form.base import pack_system
from erasec.closed_form.null_space import distinct, held_directions, without
from erasec.closed_form.solver import System, weighted_system
from erasec.model.edit_file import read_edits, write_edits
from erasec.model.view import Model
from erasec.passes.double_projection import DoubleProjection
from erasec.passes.speed import Speed
from erasec.recipe.concept import Concept

WIDTH, LENGTH = 40, 28.0
UNIT = torch.eye(WIDTH, dtype=torch.float64)
NONE = torch.zeros(0, WIDTH, dtype=torch.float64)


def states(count: int, seed: int) -> Tensor:
    """Rows of one length that share a direction."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(1, WIDTH, generator=rng, dtype=torch.float64)
    rows = common + torch.randn(count, WIDTH, generator=rng, dtype=torch.float64)
    return LENGTH * rows / rows.norm(dim=1, keepdim=True)


C, V, K, UNSEEN = states(4, 1), states(4, 2), states(9, 3), states(50, 4)
HELD = held_directions(K, 0.0)
WEIGHT = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def gap(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def matrix(keep: Tensor, ridge: float, source: Tensor = C, target: Tensor = V, weight: float = 1.0) -> Tensor:
    weights = torch.full((len(source),), weight)
    system = weighted_system(source, target, weights, NONE, torch.zeros(0))
    return null_space.solve(system, held_directions(keep, 0.0), ridge).matrix()


def published(weight: Tensor, rho: float, exact: Tensor, soft: float = 0.0, source: Tensor = C) -> Tensor:
    """W' of SPEED with the projector of K and the further rows ``exact``, in the type of ``weight`` and in its order of
    products: W + W (A - T) P (I - M2 K2 (K2^T P M2 K2 + l I)^-1 K2^T P) M2, with M2 = (T P + rho I)^-1."""
    unit, k2 = torch.eye(WIDTH, dtype=weight.dtype), exact.T.to(weight)
    c, v = source.to(weight), V[: len(source)].to(weight)
    p, t, a = unit - (HELD @ HELD.T).to(weight), c.T @ c / len(c), v.T @ c / len(c)
    m2 = torch.linalg.inv(t @ p + rho * unit)
    block = k2.T @ p @ m2 @ k2 + soft * torch.eye(k2.shape[1], dtype=weight.dtype)
    return weight + weight @ (a - t) @ p @ (unit - m2 @ k2 @ torch.linalg.inv(block) @ k2.T @ p) @ m2


def test_the_block_of_exact_rows_is_the_same_as_keeping_them() -> None:
    """The start token and the centres of the empty prompt; with the published soft block they move."""
    exact = states(4, 6)
    ours = WEIGHT @ matrix(torch.cat([K, exact]), 0.3, weight=1 / len(C))
    assert gap(ours, published(WEIGHT, 0.3, exact)) < 1e-10
    assert gap(ours @ exact.T, WEIGHT @ exact.T) < 1e-12
    assert gap(published(WEIGHT, 0.3, exact, soft=0.5) @ exact.T, WEIGHT @ exact.T) > 1e-5


def test_rows_that_are_kept_already_make_the_published_block_singular() -> None:
    """As where no list is given, so that the empty prompt is in both."""
    p, t = UNIT - HELD @ HELD.T, C.T @ C / len(C)
    block = K[:4] @ p @ torch.linalg.inv(t @ p + UNIT) @ K[:4].T
    assert float(block.norm()) < 1e-9 * LENGTH**2
    ours = matrix(torch.cat([K, K[:4]]), 1.0)
    assert gap(ours, matrix(K, 1.0)) < 1e-12
    assert gap(K @ ours.T, K) < 1e-12


def test_the_rank_depends_neither_on_repetitions_nor_on_lengths() -> None:
    """The published rule, a threshold of 0.1 on the mean Gram matrix, depends on both."""

    def published_rank(keep: Tensor) -> int:
        return int((torch.linalg.eigvalsh(keep.T @ keep / len(keep)) > 0.1).sum())

    # Strong directions and faint ones, as kept names have.
    keep = states(12, 7) @ torch.diag(torch.linspace(0, -6, WIDTH, dtype=torch.float64).exp())
    keep = LENGTH * keep / keep.norm(dim=1, keepdim=True)
    repeated = torch.cat([keep, keep[:2].repeat(500, 1)])
    assert published_rank(repeated) != published_rank(keep)
    assert published_rank(0.05 * keep) != published_rank(keep)
    for hold in (0.0, 1e-4):
        held = held_directions(keep, hold)
        for other in (distinct(repeated), 0.05 * keep):
            again = held_directions(other, hold)
            assert again.shape == held.shape
            assert gap(again @ again.T, held @ held.T) < 1e-8


def left_of_the_first(count: int, ours: bool) -> float:
    """What is left of one of ``count`` erased states that have nothing in common."""
    source, target = LENGTH * UNIT[:count], LENGTH * UNIT[20 : 20 + count]
    if ours:
        step = Speed(ridge=0.3, relative=False, hold=0.0)
        parts = [weighted_system(source[[n]], target[[n]], torch.ones(1), NONE, torch.ones(0)) for n in range(count)]
        sums = {f"{number:02}": pack_system(part, "context") for number, part in enumerate(parts)}
        moved = step.solve_system(solver.combine_systems(parts), "context", sums).matrix()
    else:
        moved = matrix(NONE, 0.3, source, target, weight=1 / count)
    return gap(moved @ source[0], target[0])


def test_adding_concepts_leaves_no_more_of_the_others() -> None:
    assert left_of_the_first(20, ours=True) == pytest.approx(left_of_the_first(1, ours=True), rel=1e-9)
    assert left_of_the_first(20, ours=False) > 10 * left_of_the_first(1, ours=False)


def test_kept_rows_hold_in_float64_and_not_in_the_published_float32() -> None:
    single = published(WEIGHT.float(), 0.05, NONE.float()).double()
    assert gap(single @ K.T, WEIGHT @ K.T) > 1e-8
    assert gap(WEIGHT @ matrix(K, 0.05, weight=1 / len(C)) @ K.T, WEIGHT @ K.T) < 1e-12


def test_a_state_inside_what_is_held_is_left_alone_where_a_pseudo_inverse_explodes() -> None:
    inside = K[:2] + K[2:4]
    plain = (V[:2] - inside).T @ torch.linalg.pinv(without(inside, HELD)).T
    assert float(plain.norm()) > 1e6
    assert gap(matrix(K, 0.0, inside, V[:2]), UNIT) < 1e-9


def test_a_large_weight_of_kept_rows_tends_to_the_projector() -> None:
    distances = [
        gap(solver.solve(System(C, V - C, K), 0.5, weight, relative=False).matrix(), matrix(K, 0.5))
        for weight in (1.0, 1e2, 1e4)
    ]
    assert distances[0] > 50 * distances[1] > 2500 * distances[2]
    assert distances[2] < 1e-4 < distances[0]


def test_the_map_follows_from_sums_alone() -> None:
    """M = I + X P (T P + r I)^-1 with X = sum s (v - c) c^T and T = sum s c c^T, for weights that differ."""
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    system = weighted_system(C, V, weights, NONE, torch.zeros(0))
    x, t = (V - C).T @ (weights[:, None] * C), C.T @ (weights[:, None] * C)
    p = UNIT - HELD @ HELD.T
    expected = UNIT + x @ p @ torch.linalg.inv(t @ p + 0.7 * UNIT)
    assert gap(null_space.solve(system, HELD, 0.7).matrix(), expected) < 1e-10
    assert gap(matrix(K, 0.7), expected) > 1e-4  # with weights of 1


def test_several_concepts_with_one_kept_goal_have_no_inverse_unless_there_is_a_ridge() -> None:
    goal = V[:1].expand(len(C), -1)
    keep = torch.cat([K, V[:1]])
    smallest = [float(torch.linalg.svdvals(matrix(keep, ridge, C, goal))[-1]) for ridge in (0.0, 1.0)]
    assert smallest[0] < 1e-10 < 1e-5 < smallest[1]


def test_edits_one_after_the_other_are_not_the_joint_edit() -> None:
    """Unless the second one keeps what the first one erased, as test_concepts_add_up_and_can_be_taken_away_again has
    it."""
    one, two = matrix(K, 0.0, C[:2], V[:2]), matrix(K, 0.0, C[2:], V[2:])
    joint = matrix(K, 0.0)
    assert min(gap(one @ two, joint), gap(two @ one, joint), gap(one @ two, two @ one)) > 0.01


def test_only_listed_rows_are_held_and_the_others_move_less_with_a_ridge() -> None:
    drifts = []
    for ridge in (0.0, 10.0, 1000.0):
        m = matrix(K, ridge)
        assert gap(K @ m.T, K) < 1e-12
        drifts.append(gap(UNSEEN @ m.T, UNSEEN))
    assert drifts[0] > drifts[1] > drifts[2] > 0.01


def test_a_safe_target_is_the_part_that_safe_states_have() -> None:
    """Of one safe state u it is u <u, c> / |u|^2, and not u, as the summary of the paper has it. The more safe states,
    the more of the concept stays."""
    step = DoubleProjection(target="safe", hold=0.0)

    def target(safe: Tensor) -> Tensor:
        source = C[:1].expand(len(safe), -1)
        return step.with_targets(System(source, safe - source, NONE), "context", {}).target()[0]

    c, u = C[0], V[0]
    assert gap(target(V[:1]), u * (u @ c) / (u @ u)) < 1e-10
    assert gap(target(V[:1]), u) > 0.1
    changes = [gap(target(safe), c) for safe in (V[:1], V, torch.cat([V, UNSEEN[:20]]))]
    assert changes[0] > changes[1] > changes[2]


@pytest.mark.parametrize("step", [Speed(hold=0.0), DoubleProjection(hold=0.0)], ids=["speed", "double_projection"])
def test_all_states_of_the_empty_prompt_stay_even_where_nothing_else_is_kept(
    step: Speed | DoubleProjection, base: Model, tmp_path: Path
) -> None:
    """And the edit is one map for all sites, which a file gives back to the last bit."""
    bare = Concept(name="star", erase=STAR.erase, anchor="circle")
    edit = step.solve(base, bare, Context())
    (shared,) = {id(delta): delta for delta in edit.deltas.values()}.values()
    unit = torch.eye(128, dtype=torch.float64)
    m = unit + shared.change(unit)
    empty = base.encode([""]).states[0].double()
    assert len(empty) == 77
    assert float(((empty @ m.T - empty).norm(dim=1) / empty.norm(dim=1)).max()) < 1e-8
    assert edit.stats["sigma_max"] < 1e3
    edited = base.with_edit(edit)
    write_edits(tmp_path / "edit", [edit], edited.base_record())
    (again,), _ = read_edits(tmp_path / "edit")
    site = next(iter(edit.deltas))
    weight, x = base.stored_weight(site).double(), base.encode(["a star"]).states[0].double()
    assert torch.equal(again.deltas[site].change(weight), edit.deltas[site].change(weight))
    assert gap(x @ (weight + edit.deltas[site].change(weight)).T, (x @ m.T) @ weight.T) < 1e-10
