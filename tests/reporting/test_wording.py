"""Words of the report: lists, and the explanations of stats."""

from __future__ import annotations

import pytest

from erasec.reporting.wording import STATS, meaning, words


@pytest.mark.parametrize(
    ("stat", "key"),
    [
        ("drift", "drift"),
        ("loss_first", "loss_first"),
        ("loss hide_first", "loss_first"),
        ("loss keep_last", "loss_last"),
    ],
)
def test_known_stats_are_explained(stat: str, key: str) -> None:
    assert meaning(stat) == STATS[key]


@pytest.mark.parametrize("stat", ["of_my_own", "loss", "loss keep", "loss keep_middle"])
def test_unknown_stats_are_not_explained(stat: str) -> None:
    assert meaning(stat) == ""


def test_lists() -> None:
    assert words(["a"]) == "a" and words("abc") == "a, b and c" and words("abcd", most=2) == "a, b and 2 more"
