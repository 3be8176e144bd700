"""Numbers and lists as people read them."""

from __future__ import annotations

import math

import pytest

from erasec.reporting.wording import STATS, meaning, number, percent, share, words


@pytest.mark.parametrize(
    ("stat", "key"),
    [
        ("drift", "drift"),
        ("loss_first", "loss_first"),
        ("loss hide_first", "loss_first"),
        ("loss keep_last", "loss_last"),
    ],
)
def test_measurements_are_explained(stat: str, key: str) -> None:
    assert meaning(stat) == STATS[key]


@pytest.mark.parametrize("stat", ["of_my_own", "loss", "loss keep", "loss keep_middle"])
def test_what_is_not_known_is_not_explained(stat: str) -> None:
    assert meaning(stat) == ""


@pytest.mark.parametrize(
    ("part", "said"),
    [(0.0, "0 %"), (0.125, "12.5 %"), (0.0312345, "3.12 %"), (4.321e-5, "0.00432 %"), (1.2e-7, "1.2 × 10^−5 %"),
     (math.inf, "infinite"), (math.nan, "not a number")],
)  # fmt: skip
def test_small_shares_keep_their_digits(part: float, said: str) -> None:
    assert share(part) == said.replace(" %", "\u00a0%")


def test_a_rate_is_never_rounded_to_all_or_nothing() -> None:
    assert (percent(0.0001), percent(0.9999)) == ("under 0.1\u00a0%", "over 99.9\u00a0%")
    assert (percent(0.0), percent(1.0)) == ("0\u00a0%", "100\u00a0%")


def test_numbers_and_lists() -> None:
    assert number(1234567.0) == "1.23 × 10^6" and number(-0.25) == "−0.25"
    assert words(["a"]) == "a" and words("abc") == "a, b and c" and words("abcd", most=2) == "a, b and 2 more"
