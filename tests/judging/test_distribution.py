"""CMMD and KID: against loops over their definitions, and on distributions whose distance is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from erasec.judging import distribution
from erasec.judging.distribution import cmmd, halves, kid

Rows = np.ndarray[Any, np.dtype[np.float64]]


def normal(count: int, seed: int, shift: float = 0.0) -> Rows:
    """Embeddings (count, 12) around a mean that depends on ``shift``."""
    rows = np.random.default_rng(seed).normal(size=(count, 12)) + 1.0
    rows[:, 0] += shift
    return rows


def by_loops(x: Rows, y: Rows, kernel: Callable[[Rows, Rows], float]) -> float:
    """Gretton et al. (2012), equation 4: all ordered pairs of different indices."""
    n, total = len(x), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
    return total / (n * (n - 1))


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


def test_both_agree_with_loops_over_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "BLOCK", 7)  # blocks of unequal size
    x, y = normal(25, 0), normal(25, 1, 0.7)
    gaussian = by_loops(unit(x), unit(y), lambda a, b: float(np.exp(-((a - b) ** 2).sum() / (2 * 10.0**2))))
    assert cmmd(x, y).value == pytest.approx(1000 * gaussian, rel=1e-9)
    root = np.sqrt(12)
    cubic = by_loops(root * unit(x), root * unit(y), lambda a, b: float((a @ b / 12 + 1) ** 3))
    assert kid(x, y).value == pytest.approx(cubic, rel=1e-9)


@pytest.mark.parametrize("distance", [cmmd, kid])
def test_the_jackknife_agrees_with_leaving_out_each_pair(distance: Callable[..., Any]) -> None:
    x, y = normal(20, 2), normal(20, 3, 0.5)
    without = np.array([distance(np.delete(x, i, 0), np.delete(y, i, 0)).value for i in range(20)])
    error = np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    value, low, high = distance(x, y)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error))


@pytest.mark.parametrize("distance", [cmmd, kid])
def test_equal_pictures_are_no_distance_apart(distance: Callable[..., Any]) -> None:
    rows = normal(300, 4)
    assert distance(rows, rows) == pytest.approx((0, 0, 0), abs=1e-9)


@pytest.mark.parametrize("distance", [cmmd, kid])
def test_other_draws_of_one_distribution_are_near_and_a_shift_is_far(distance: Callable[..., Any]) -> None:
    same = [distance(normal(200, 2 * seed), normal(200, 2 * seed + 1)) for seed in range(20)]
    assert abs(np.mean([item.value for item in same])) < 0.1 * distance(normal(200, 0), normal(200, 1, 1.0)).value
    assert np.mean([item.low <= 0 <= item.high for item in same]) >= 0.9
    small, large = (distance(normal(200, 0), normal(200, 1, shift)) for shift in (0.5, 2.0))
    assert small.low > 0 and small.high < large.low


def test_the_halves_of_one_set_are_near_whatever_its_order() -> None:
    rows = np.concatenate([normal(200, 5), normal(200, 6, 3.0)])
    mixed = halves(rows, cmmd)
    assert mixed.low <= 0.1 * cmmd(rows[:200], rows[200:]).value
    assert halves(rows, cmmd) == mixed


def test_sets_that_are_no_pairs_are_refused() -> None:
    for x, y in ((normal(5, 0), normal(6, 0)), (normal(2, 0), normal(2, 1))):
        with pytest.raises(ValueError, match="no three pairs"):
            cmmd(x, y)


def test_what_is_not_finite_is_not_a_number() -> None:
    broken = normal(10, 0)
    broken[3] = 0  # has no direction
    with np.errstate(invalid="ignore"):
        assert np.isnan(cmmd(broken, normal(10, 1)).value)
