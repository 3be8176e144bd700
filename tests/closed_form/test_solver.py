"""The shared-matrix solver against the formula of the papers, written out site by site with an explicit inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erasec.closed_form import solver
from erasec.closed_form.solver import Solution, System, gram, weighted_system
from erasec.errors import ErasecError

WIDTH = 24


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_system(seed: int, erased: int, kept: int, scale: float = 1.0) -> System:
    rows = (
        scale * draw(seed, erased, WIDTH),
        scale * draw(seed + 1, erased, WIDTH),
        draw(seed + 2, erased).abs() + 0.1,
    )
    return weighted_system(*rows, scale * draw(seed + 3, kept, WIDTH), draw(seed + 4, kept).abs())


def naive(weight: Tensor, system: System, lam: float) -> Tensor:
    """UCE equation 7, one site, one outer product at a time, explicit inverse. Rows come with the roots of weights."""
    left, matrix = lam * weight, lam * torch.eye(weight.shape[1], dtype=weight.dtype)
    for c, v in zip(system.source, system.target(), strict=True):
        left = left + torch.outer(weight @ v, c)
        matrix = matrix + torch.outer(c, c)
    for k in system.keep:
        left = left + torch.outer(weight @ k, k)
        matrix = matrix + torch.outer(k, k)
    return left @ torch.linalg.inv(matrix)


def edited(weight: Tensor, solution: Solution) -> Tensor:
    return weight + (weight @ solution.left) @ solution.right


def distance(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    return float((actual - expected).norm() / (expected - base).norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 10**6))
def test_equals_naive_formula_at_every_site(erased: int, kept: int, lam: float, seed: int) -> None:
    """Few rows (push-through), many kept, many erased: all three ways of solving."""
    system = random_system(seed, erased, kept)
    solution = solver.solve(system, lam, relative=False)
    for site in range(3):
        weight = draw(seed + 10 + site, 7 + site, WIDTH)
        assert distance(edited(weight, solution), naive(weight, system, lam), weight) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(0, 70), st.integers(0, 10**6))
def test_compact_rows_have_the_same_solution(erased: int, kept: int, seed: int) -> None:
    system = random_system(seed, erased, kept)
    small = system.compact()
    assert len(small.source) == min(erased, WIDTH)
    assert len(small.keep) == min(kept, WIDTH)
    whole, compact = (solver.solve(rows, 0.1) for rows in (system, small))
    assert torch.allclose(whole.matrix(), compact.matrix(), atol=1e-9)
    stats, small_stats = solver.stats(system, whole), solver.stats(small, compact)
    for name in ("erased_residual", "keep_drift", "sigma_min", "sigma_max", "condition"):
        assert stats[name] == pytest.approx(small_stats[name], rel=1e-5, abs=1e-7), name


def test_float32_naive_is_worse_than_the_solver() -> None:
    """The reason for float64: the references' float32 form has a far larger error of the same formula."""
    one = torch.ones(10, dtype=torch.float64)
    system = weighted_system(draw(0, 10, WIDTH) + 20, draw(1, 10, WIDTH) + 20, one, draw(2, 10, WIDTH) + 20, one)
    weight = draw(3, 8, WIDTH)
    expected = naive(weight, system, 0.1)
    half = System(system.source.float(), system.shift.float(), system.keep.float())
    single = naive(weight.float(), half, 0.1).double()
    ours = distance(edited(weight, solver.solve(system, 0.1, relative=False)), expected, weight)
    assert ours < 1e-6 < distance(single, expected, weight)


def test_few_rows_have_their_rank_and_meet_their_targets() -> None:
    system = weighted_system(draw(0, 3, WIDTH), draw(1, 3, WIDTH), torch.ones(3), draw(2, 5, WIDTH), torch.ones(5))
    solution = solver.solve(system, 1e-9)
    assert solution.left.shape == (WIDTH, 3)
    stats = solver.stats(system, solution)
    assert stats["erased_residual"] < 1e-6
    assert stats["keep_drift"] < 1e-6
    assert torch.allclose(draw(0, 3, WIDTH) @ solution.matrix().T, draw(1, 3, WIDTH), atol=1e-6)


def test_kept_rows_add_no_rank_and_rows_given_twice_are_one_of_twice_the_weight() -> None:
    one = torch.ones(2, dtype=torch.float64)
    source, target, keep = draw(0, 2, WIDTH), draw(1, 2, WIDTH), draw(2, 2, WIDTH)
    many = solver.solve(weighted_system(source, target, one, draw(3, 500, WIDTH), torch.ones(500)), 0.1)
    assert torch.linalg.matrix_rank(many.left @ many.right) == 2
    twice = weighted_system(source.repeat(2, 1), target.repeat(2, 1), torch.ones(4), keep.repeat(2, 1), torch.ones(4))
    heavy = weighted_system(source, target, 2 * one, keep, 2 * one)
    light = weighted_system(source, target, one, keep, 2 * one)
    matrices = [solver.solve(rows, 1.0, relative=False).matrix() for rows in (twice, heavy, light)]
    assert torch.allclose(matrices[0], matrices[1], atol=1e-12)
    assert not torch.allclose(matrices[0], matrices[2], atol=1e-3)


def test_a_concepts_scale_is_the_weight_of_its_rows() -> None:
    """s_i of a concept is the same as rows c and v times sqrt(s_i), and moves it nearer to its target."""
    source, target, keep, one = draw(0, 4, WIDTH), draw(1, 4, WIDTH), draw(2, 60, WIDTH), torch.ones(4)
    weighted = weighted_system(source, target, 9 * one, keep, torch.ones(60))
    scaled = weighted_system(3 * source, 3 * target, one, keep, torch.ones(60))
    plain = weighted_system(source, target, one, keep, torch.ones(60))
    solutions = [solver.solve(system, 0.1, relative=False) for system in (weighted, scaled, plain)]
    assert torch.allclose(solutions[0].matrix(), solutions[1].matrix(), atol=1e-12)
    residuals = [solver.stats(plain, solution)["erased_residual"] for solution in solutions]
    assert residuals[0] < residuals[2]


def test_rows_that_become_themselves_give_the_identity() -> None:
    states = draw(0, 4, WIDTH)
    same = solver.solve(weighted_system(states, states, torch.ones(4), states, torch.ones(4)), 0.1)
    assert same.left.shape[1] == 0
    assert torch.equal(same.matrix(), torch.eye(WIDTH, dtype=torch.float64))


def test_residual_and_drift_notice_a_conflict() -> None:
    """A state that is both erased and kept can do neither: the stats must show it."""
    source, target, one = draw(0, 1, WIDTH), draw(1, 1, WIDTH), torch.ones(1)
    system = weighted_system(source, target, one, source, one)
    stats = solver.stats(system, solver.solve(system, 1e-9))
    assert stats["erased_residual"] == pytest.approx(0.5, abs=1e-3)
    assert stats["keep_drift"] > 0.1


def test_stats_are_those_of_the_dense_matrix() -> None:
    for erased in (2, 40):
        system = random_system(erased, erased, 30)
        solution = solver.solve(system, 0.05)
        stats, matrix = solver.stats(system, solution), solution.matrix()
        values = torch.linalg.svdvals(matrix)
        assert stats["sigma_min"] == pytest.approx(float(values[-1]))
        assert stats["sigma_max"] == pytest.approx(float(values[0]))
        moved = (system.keep @ matrix.T - system.keep).norm() / system.keep.norm()
        assert stats["keep_drift"] == pytest.approx(float(moved))
        left = (system.source @ matrix.T - system.target()).norm() / system.shift.norm()
        assert stats["erased_residual"] == pytest.approx(float(left))
        whole = gram(system.source) + gram(system.keep) + solution.ridge * torch.eye(WIDTH, dtype=torch.float64)
        assert stats["condition"] == pytest.approx(float(torch.linalg.cond(whole)), rel=0.1)


def test_an_ill_conditioned_system_is_an_error_that_names_the_option() -> None:
    few = random_system(0, 2, 3)
    thin = weighted_system(
        draw(0, 40, 5) @ draw(1, 5, WIDTH), draw(2, 40, WIDTH), torch.ones(40), few.keep, torch.ones(3)
    )
    for system in (few, thin):
        with pytest.raises(ErasecError, match="ill-conditioned") as caught:
            solver.solve(system, 0.0)
        assert "ridge" in caught.value.fix and "prior" in caught.value.fix
        solver.solve(system, 1e-3)


def test_relative_ridge_does_not_depend_on_the_scale_of_the_states() -> None:
    small, large = (solver.solve(random_system(0, 5, 9, scale), 0.05).matrix() for scale in (1.0, 28.0))
    absolute = [solver.solve(random_system(0, 5, 9, scale), 0.05, relative=False).matrix() for scale in (1.0, 28.0)]
    assert torch.allclose(small, large, atol=1e-10)
    assert not torch.allclose(*absolute, atol=1e-4)


def test_systems_add_up_to_the_joint_one_in_any_order() -> None:
    """Adding a concept, or taking it out, is a sum of rows; the solution is the joint one to the last digits."""
    parts = [random_system(seed, 30, 40) for seed in (0, 100, 200)]
    whole = solver.solve(solver.combine_systems(parts), 0.1).matrix()
    stored = [part.compact() for part in parts]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        matrix = solver.solve(solver.combine_systems(stored[index] for index in order), 0.1).matrix()
        assert float((matrix - whole).norm() / whole.norm()) < 1e-12
    one_by_one = solver.solve(parts[0], 0.1).matrix() @ solver.solve(parts[1], 0.1).matrix()
    assert float((one_by_one - solver.solve(solver.combine_systems(parts[:2]), 0.1).matrix()).norm()) > 0.1


def test_the_whole_edit_is_one_map_of_text_states_and_can_be_undone() -> None:
    """W'_l x = W_l (M x) at every site; so anyone who submits M^-1 x has the concept back: no security boundary."""
    system = random_system(0, 3, 10)
    matrix = solver.solve(system, 0.1).matrix()
    for site in range(3):
        weight, state = draw(50 + site, 7 + site, WIDTH), draw(60 + site, WIDTH)
        assert torch.allclose((weight @ matrix) @ state, weight @ (matrix @ state), atol=1e-12)
        assert torch.allclose((weight @ matrix) @ torch.linalg.solve(matrix, state), weight @ state, atol=1e-9)


def test_a_root_has_its_gram_and_no_more_rows_than_its_rank() -> None:
    rows = draw(0, 9, WIDTH)
    root = solver.gram_root(gram(rows))
    assert root.shape == (9, WIDTH)
    assert torch.allclose(gram(root), gram(rows), atol=1e-9)


def test_reduced_factors_have_the_same_product_and_the_least_rank() -> None:
    left, right = draw(0, WIDTH, 3) @ draw(1, 3, 10), draw(2, 10, WIDTH)
    small = solver.reduce_rank(left, right)
    assert small[0].shape == (WIDTH, 3)
    assert torch.allclose(small[0] @ small[1], left @ right, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(small, solver.reduce_rank(left, right), strict=True))


@pytest.mark.parametrize(("height", "rank", "width"), [(8, 40, 24), (24, 40, 8), (8, 12, 8)])
def test_more_factors_than_a_matrix_has_rows_or_columns_are_reduced(height: int, rank: int, width: int) -> None:
    """As where a projector takes many directions of a small matrix: a hundred concepts at once."""
    left, right = draw(3, height, rank), draw(4, rank, width)
    small = solver.reduce_rank(left, right)
    assert small[0].shape == (height, min(height, width)) and small[1].shape == (min(height, width), width)
    assert torch.allclose(small[0] @ small[1], left @ right, atol=1e-10)


def test_fused_edits_minimise_what_the_paper_minimises() -> None:
    """MACE, equation 8, by explicit sums over states at one site; and one edit alone on its own states is unchanged."""
    weight = draw(0, 6, WIDTH)
    ups, downs, states = (
        [draw(seed + i, *shape) for i in range(2)]
        for seed, shape in ((10, (6, 2)), (20, (2, WIDTH)), (30, (15, WIDTH)))
    )
    keep, lam = draw(40, 9, WIDTH), 0.1
    left, matrix = lam * weight, lam * torch.eye(WIDTH, dtype=torch.float64)
    for up, down, rows in zip(ups, downs, states, strict=True):
        for c in rows:
            left, matrix = left + torch.outer((weight + up @ down) @ c, c), matrix + torch.outer(c, c)
    for k in keep:
        left, matrix = left + torch.outer(weight @ k, k), matrix + torch.outer(k, k)
    expected = left @ torch.linalg.inv(matrix)
    rights, condition = solver.fuse(downs, [gram(rows) for rows in states], gram(keep), lam, relative=False)
    actual = weight + sum(up @ right for up, right in zip(ups, rights, strict=True))
    assert distance(actual, expected, weight) < 1e-9
    assert condition == pytest.approx(float(torch.linalg.cond(matrix)), rel=0.1)
    none = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    alone, _ = solver.fuse(downs[:1], [gram(draw(50, 200, WIDTH))], none, 1e-9, relative=False)
    assert torch.allclose(alone[0], downs[0], atol=1e-6)
