"""The prompts of files: how they are painted, and what their tables and checks say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from erasec.base import Question
from erasec.glyphs.judge import GlyphJudge
from erasec.judging import prompt_groups
from erasec.judging.intervals import wilson
from erasec.judging.prompt_files import PromptFile, PromptRow
from erasec.recipe import concept

FILE = PromptFile(
    "i2p",
    "ab" * 32,
    9,
    (
        PromptRow("a", ("hate", "sexual"), 5, 7.0),
        PromptRow("b", ("sexual",)),
        PromptRow("c", (), 6, 4.0),
        PromptRow("d", ("hate",), 7, 7.0),
    ),
)


def seen(*shown: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.isin(np.arange(4), shown)


def test_rows_keep_their_seeds_and_the_rest_get_those_of_the_build() -> None:
    asked = prompt_groups.questions(FILE, "star", 2)
    assert [(item.group, item.prompt, item.seed, item.looked_for) for item in asked] == [
        ("i2p/hate", "a", 5, "star"),
        ("i2p/sexual", "b", 2_000_007, "star"),
        ("i2p", "c", 6, "star"),
        ("i2p/hate", "d", 7, "star"),
    ]


def test_rows_of_one_guidance_scale_are_painted_together_and_come_back_in_order() -> None:
    calls = []

    def painter(questions: Sequence[Question], guidance: float) -> Any:
        calls.append(([item.prompt for item in questions], [item.seed for item in questions], guidance))
        before = np.stack([np.full((2, 2, 3), ord(item.prompt), np.uint8) for item in questions])
        return before, before + 100

    before, after = prompt_groups.paint(FILE, 0, 4.0, painter)
    assert calls == [(["b", "c"], [1, 6], 4.0), (["a", "d"], [5, 7], 7.0)]
    assert before.shape == (4, 2, 2, 3) and before[:, 0, 0, 0].tolist() == [97, 98, 99, 100]
    assert np.array_equal(after, before + 100)


def test_a_table_counts_all_prompts_and_each_category_with_intervals() -> None:
    facts = prompt_groups.table(FILE, {"star": (seen(0, 1, 3), seen(1))})
    assert {key: facts[key] for key in ("file", "prompts", "used")} == {"file": "i2p", "prompts": 9, "used": 4}
    rows = {row["category"]: row for row in facts["rows"]}
    assert [(name, row["images"], row["before"], row["after"]) for name, row in rows.items()] == [
        ("", 4, 0.75, 0.25),
        ("hate", 2, 1.0, 0.0),
        ("sexual", 2, 1.0, 0.5),
    ]
    assert rows["hate"]["after_interval"] == list(wilson(0, 2)) and rows[""]["before_interval"] == list(wilson(3, 4))


def test_checks_are_reported_and_with_a_limit_they_fail_what_is_still_shown() -> None:
    facts = prompt_groups.table(FILE, {"star": (seen(0, 1, 3), seen(1))})
    reported = prompt_groups.checks(facts, None, "4 steps")
    assert [(check.name, check.value, check.outcome) for check in reported] == [
        ("prompts/i2p", 0.25, "reported"),
        ("prompts/i2p/hate", 0.0, "reported"),
        ("prompts/i2p/sexual", 0.5, "reported"),
    ]
    assert reported[0].how.startswith("share of pictures that show star after the edit, 25.0% (4.6% to 69.9%), before")
    assert reported[0].how.endswith("4 prompts; 4 steps")
    assert [check.passed for check in prompt_groups.checks(facts, 0.3, "")] == [True, True, False]


def test_a_file_that_never_shows_the_concept_proves_nothing() -> None:
    """As with the other prompts: a rate of 0 after 0 does not show that anything was erased."""
    facts = prompt_groups.table(FILE, {"star": (seen(), seen())})
    assert all(math.isinf(check.value) and not check.passed for check in prompt_groups.checks(facts, 0.9, ""))
    # A category may be empty of it, as MACE's prompts for others are, if the file is not.
    some = prompt_groups.table(FILE, {"star": (seen(0), seen())})
    assert all(check.passed for check in prompt_groups.checks(some, 0.0, ""))


def test_each_of_several_labels_has_its_checks() -> None:
    facts = prompt_groups.table(FILE, {"ring": (seen(0), seen(0)), "star": (seen(), seen())})
    named = {check.name: check for check in prompt_groups.checks(facts, 0.5, "")}
    assert named["prompts/i2p/ring"].value == 0.25 and named["prompts/i2p/hate/ring"].value == 0.5
    assert math.isinf(named["prompts/i2p/star"].value)


def test_nothing_is_looked_for_that_no_judge_can_see() -> None:
    star, other = concept.find("star", "glyphs"), concept.find("umbrella")
    assert prompt_groups.labels_of(GlyphJudge(), [star, other]) == ["star"]
    assert prompt_groups.labels_of(GlyphJudge(), [other]) == prompt_groups.labels_of(None, [star]) == []
    empty = prompt_groups.table(FILE, {})
    assert empty["rows"] == [] and prompt_groups.checks(empty, 0.0, "") == ()


@pytest.mark.parametrize("side", ["before_interval", "after_interval"])
def test_intervals_are_those_of_the_rate_beside_them(side: str) -> None:
    facts = prompt_groups.table(FILE, {"star": (seen(0, 1), seen(2))})
    for row in facts["rows"]:
        assert row[side][0] <= row[side.removesuffix("_interval")] <= row[side][1]
