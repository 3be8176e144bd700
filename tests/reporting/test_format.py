"""Numbers of the report: rates, shares, sizes."""

from __future__ import annotations

import math

import pytest

from erasec.checkpoint.disk import size
from erasec.reporting.format import about, number, percent, share


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0.0, "0 %"),
        (0.125, "12.5 %"),
        (0.0312345, "3.12 %"),
        (4.321e-5, "0.00432 %"),
        (1.2e-7, "1.2 × 10^−5 %"),
        (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
)
def test_small_shares_keep_their_digits(part: float, text: str) -> None:
    assert share(part) == text.replace(" %", "\u00a0%")


def test_a_rate_is_never_rounded_to_all_or_nothing() -> None:
    assert (percent(0.0001), percent(0.9999)) == ("under 0.1\u00a0%", "over 99.9\u00a0%")
    assert (percent(0.0), percent(1.0)) == ("0\u00a0%", "100\u00a0%")


def test_very_large_numbers_have_a_power_of_ten() -> None:
    assert number(1234567.0) == "1.23 × 10^6" and number(-0.25) == "−0.25"


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (4_265_000_000, "4.26 GB")]
)
def test_sizes_have_three_digits(count: int, words: str) -> None:
    assert size(count) in (words, words.replace("4.26", "4.27"))


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (0.01, 0.02, "less than 0.1 s"),
        (3.5, 3.5, "about 3.5 s"),
        (2.04, 61.7, "about 2 to 62 s"),
        (240.0, 540.0, "about 4 to 9 minutes"),
        (1800.0, 36000.0, "about 0.5 to 10 hours"),
    ],
)
def test_a_range_of_seconds_has_the_unit_of_its_end(least: float, most: float, text: str) -> None:
    assert about(least, most) == text
