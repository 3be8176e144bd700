"""Intervals of shares and means."""

from __future__ import annotations

import math

import numpy as np
import pytest

from erasec.judging.intervals import Interval, mean, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe (1998), table I, method 3, to four digits.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_s_interval_is_the_published_one(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=6e-5)


def test_wilson_s_interval_stays_within_zero_and_one_and_is_symmetric() -> None:
    for count in (1, 2, 7, 1000):
        for hits in range(0, count + 1, max(1, count // 7)):
            low, high = wilson(hits, count)
            assert 0 <= low <= hits / count <= high <= 1
            assert wilson(count - hits, count) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = [low <= 3.0 <= high for _, low, high in (mean(rng.normal(3.0, 2.0, 50)) for _ in range(400))]
    assert 0.90 < np.mean(inside) < 0.98
    assert mean(np.array([2.0])) == (2.0, -math.inf, math.inf)
    assert Interval(0.0213, 0.0119, 0.0301).text() == "0.021 (0.012 to 0.030)"
