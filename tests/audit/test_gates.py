"""Gates: the worst row decides, and what was not measured fails."""

from __future__ import annotations

import math

import pytest

from erasec.audit.base import Rate, Reading
from erasec.audit.gates import check_gates


def reading(probe: str, variant: str, hits: int, count: int = 20) -> Reading:
    return Reading(probe, variant, "prompt", {"model": Rate(hits, count), "base": Rate(count, count)})


def not_run(probe: str) -> Reading:
    return Reading(probe, "", "prompt", {}, obstacle="the budget was spent")


ROWS = (reading("prompts", "name", 1), reading("prompts", "synonym", 6), not_run("inversion"))


def test_the_worst_row_of_a_probe_decides() -> None:
    low, high = check_gates(ROWS, {"prompts": 0.2, "prompts/name": 0.2})
    assert (low.outcome, low.value) == ("failed", 0.3) and "6 of 20" in low.how and "synonym" in low.how
    assert (high.outcome, high.value) == ("passed", 0.05)


def test_a_rate_at_the_limit_passes_and_the_base_does_not_count() -> None:
    (gate,) = check_gates(ROWS, {"prompts": 0.3})
    assert gate.outcome == "passed"


@pytest.mark.parametrize("name", ["inversion", "inversion/1 token", "prompts/misspelt", "prompt", "", "/name"])
def test_what_was_not_measured_fails_with_a_reason(name: str) -> None:
    (gate,) = check_gates(ROWS, {name: 1.0})
    assert (gate.outcome, gate.value) == ("failed", None) and gate.how


def test_the_reason_is_the_obstacle_or_names_what_there_is() -> None:
    obstacle, variant, unknown = check_gates(ROWS, {"inversion": 1.0, "prompts/names": 1.0, "promts": 1.0})
    assert "the budget was spent" in obstacle.how
    assert "'prompts/name'" in variant.how and "'prompts'" in unknown.how
    (empty,) = check_gates((), {"prompts": 1.0})
    assert empty.outcome == "failed" and empty.how == "nothing was run"


def test_a_probe_that_was_run_only_in_part_does_not_pass() -> None:
    rows = (*ROWS, reading("inversion", "1 token", 0))
    part, own, exceeded = check_gates(rows, {"inversion": 0.5, "inversion/1 token": 0.5})[:2] + check_gates(
        (*rows, reading("inversion", "2 tokens", 20)), {"inversion": 0.5}
    )
    assert (part.outcome, part.value) == ("failed", None) and "1 of 2 rows" in part.how
    assert (own.outcome, own.value) == ("passed", 0.0)
    assert (exceeded.outcome, exceeded.value) == ("failed", 1.0)


@pytest.mark.parametrize("rates", [{}, {"base": Rate(0, 20)}, {"model": Rate(0, 0)}])
def test_no_pictures_are_no_rate_of_zero(rates: dict[str, Rate]) -> None:
    (gate,) = check_gates([Reading("prompts", "name", "prompt", rates)], {"prompts": 1.0})  # type: ignore[arg-type]
    assert (gate.outcome, gate.value) == ("failed", None)


def test_a_limit_that_is_no_number_fails() -> None:
    (gate,) = check_gates(ROWS, {"prompts": math.nan})
    assert gate.outcome == "failed"


def test_rows_with_pictures_are_compared_by_name_only() -> None:
    import numpy as np

    rows = [Reading("a", "", "prompt", {}, obstacle="no", shown=np.zeros((4, 2, 2, 3), np.uint8)) for _ in range(2)]
    assert check_gates(rows, {"a/b": 1.0})[0].outcome == "failed"
