"""Gates: a limit holds for the worst row, and what was not measured never passes."""

from __future__ import annotations

from erasec.audit.base import Rate, Reading
from erasec.audit.gates import check_gates

READINGS = (
    Reading("prompts", "name", "prompt", {"model": Rate(0, 20)}),
    Reading("prompts", "synonym", "prompt", {"model": Rate(3, 20)}),
    Reading("inversion", "", "weights", {}, obstacle="it needs the base"),
)


def test_the_worst_row_decides() -> None:
    (passed,) = check_gates(READINGS, {"prompts": 0.15})
    (failed,) = check_gates(READINGS, {"prompts": 0.14})
    assert (passed.outcome, passed.value) == ("passed", 0.15)
    assert (failed.outcome, failed.value) == ("failed", 0.15)


def test_one_variant_can_have_a_limit_of_its_own() -> None:
    (gate,) = check_gates(READINGS, {"prompts/name": 0.0})
    assert (gate.outcome, gate.value) == ("passed", 0.0)


def test_what_was_not_run_fails_and_has_no_value() -> None:
    for name in ("inversion", "inversion/1 token", "undo", "prompts/negated"):
        (gate,) = check_gates(READINGS, {name: 1.0})
        assert (gate.outcome, gate.value) == ("failed", None)
        assert gate.how
    (empty,) = check_gates((), {"prompts": 1.0})
    assert empty.outcome == "failed"
