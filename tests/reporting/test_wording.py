"""Words of the report: lists, and the explanations of stats."""

from __future__ import annotations

import pytest

from erasec.reporting.wording import STATS, by_origin, meaning, words


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


def test_options_are_grouped_by_where_they_come_from() -> None:
    options = {"lr": 1.0, "steps": 2, "keep": 0.0, "rank": 0}
    origins = {"lr": "class", "steps": "flag", "keep": "class", "rank": "family"}
    assert by_origin(options, origins) == [
        ("by flag", {"steps": 2}),
        ("from the table of the family", {"rank": 0}),
        ("defaults of the pass", {"lr": 1.0, "keep": 0.0}),
    ]
    assert by_origin(options, {}) == [("", options)] and by_origin({}, {}) == []
