"""The shared-matrix solver against the formula of the papers, written out site by site with an explicit inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erasec import closed_form
from erasec.closed_form import Rows, gram
from erasec.errors import ErasecError

WIDTH = 24


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(weight: Tensor, rows: Rows, keep: Tensor, keep_weight: Tensor, lam: float) -> Tensor:
    """UCE equation 7, one site, one outer product at a time, explicit inverse."""
    left, system = lam * weight, lam * torch.eye(weight.shape[1], dtype=weight.dtype)
    for c, v, s in zip(rows.source, rows.target, rows.weight, strict=True):
        left = left + s * torch.outer(weight @ v, c)
        system = system + s * torch.outer(c, c)
    for k, p in zip(keep, keep_weight, strict=True):
        left = left + p * torch.outer(weight @ k, k)
        system = system + p * torch.outer(k, k)
    return left @ torch.linalg.inv(system)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 10**6))
def test_equals_naive_formula_at_every_site(erased: int, kept: int, lam: float, seed: int) -> None:
    rows = Rows(draw(seed, erased, WIDTH), draw(seed + 1, erased, WIDTH), draw(seed + 2, erased).abs() + 0.1)
    keep, keep_weight = draw(seed + 3, kept, WIDTH), draw(seed + 4, kept).abs()
    solution = closed_form.solve(rows, gram(keep, keep_weight), lam, relative=False)
    for site in range(3):
        weight = draw(seed + 10 + site, 7 + site, WIDTH)
        wanted = naive(weight, rows, keep, keep_weight, lam)
        found = weight + (weight @ solution.left) @ solution.right
        assert float((found - wanted).norm() / (wanted - weight).norm()) < 1e-6


def test_float32_naive_is_worse_than_the_solver() -> None:
    """The reason for float64: what the references do in float32 misses the same formula by far more."""
    rows = Rows(draw(0, 10, WIDTH) + 20, draw(1, 10, WIDTH) + 20, torch.ones(10, dtype=torch.float64))
    keep, keep_weight, weight = draw(2, 10, WIDTH) + 20, torch.ones(10, dtype=torch.float64), draw(3, 8, WIDTH)
    wanted = naive(weight, rows, keep, keep_weight, 0.1)
    solution = closed_form.solve(rows, gram(keep, keep_weight), 0.1, relative=False)
    half = Rows(rows.source.float(), rows.target.float(), rows.weight.float())
    single = naive(weight.float(), half, keep.float(), keep_weight.float(), 0.1).double()
    scale = (wanted - weight).norm()
    ours = float((weight @ solution.matrix() - wanted).norm() / scale)
    assert ours < 1e-6 < float((single - wanted).norm() / scale)


def test_few_rows_have_their_rank_and_meet_their_targets() -> None:
    rows = Rows(draw(0, 3, WIDTH), draw(1, 3, WIDTH), torch.ones(3, dtype=torch.float64))
    solution = closed_form.solve(rows, gram(draw(2, 5, WIDTH), torch.ones(5)), 1e-9)
    assert solution.left.shape == (WIDTH, 3)
    assert solution.stats["erased_residual"] < 1e-6
    assert solution.stats["keep_drift"] < 1e-6
    assert torch.allclose(rows.source @ solution.matrix().T, rows.target, atol=1e-6)


def test_nothing_asked_nothing_moved() -> None:
    states = draw(0, 4, WIDTH)
    same = closed_form.solve(Rows(states, states, torch.ones(4, dtype=torch.float64)), gram(states, torch.ones(4)), 0.1)
    assert same.left.shape[1] == 0
    assert torch.equal(same.matrix(), torch.eye(WIDTH, dtype=torch.float64))


def test_residual_and_drift_notice_a_conflict() -> None:
    """A state that is to move and to stay cannot do both: the stats must say so."""
    source, target = draw(0, 1, WIDTH), draw(1, 1, WIDTH)
    one = torch.ones(1, dtype=torch.float64)
    stats = closed_form.solve(Rows(source, target, one), gram(source, one), 1e-9).stats
    assert stats["erased_residual"] == pytest.approx(0.5, abs=1e-3)
    assert stats["keep_drift"] > 0.1


def test_drift_from_the_gram_is_the_drift_of_the_states() -> None:
    states, weight, matrix = draw(0, 30, WIDTH), draw(1, 30).abs(), draw(2, WIDTH, WIDTH)
    moved = weight[:, None] * (states @ matrix.T - states).pow(2)
    wanted = float((moved.sum() / (weight[:, None] * states.pow(2)).sum()).sqrt())
    assert closed_form.drift(matrix, gram(states, weight)) == pytest.approx(wanted)


def test_ill_conditioned_system_is_an_error_that_names_the_knob() -> None:
    rows = Rows(draw(0, 2, WIDTH), draw(1, 2, WIDTH), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ErasecError, match="ill-conditioned") as caught:
        closed_form.solve(rows, gram(draw(2, 3, WIDTH), torch.ones(3)), 0.0)
    assert "ridge" in caught.value.fix


def test_relative_ridge_does_not_depend_on_the_scale_of_the_states() -> None:
    def matrix(scale: float) -> Tensor:
        rows = Rows(scale * draw(0, 5, WIDTH), scale * draw(1, 5, WIDTH), torch.ones(5, dtype=torch.float64))
        return closed_form.solve(rows, gram(scale * draw(2, 9, WIDTH), torch.ones(9)), 0.05).matrix()

    assert torch.allclose(matrix(1.0), matrix(28.0), atol=1e-10)
