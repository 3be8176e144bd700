"""The time of a build, from counted operations: it follows the options and the speed of the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from erasec.commands import durations
from erasec.commands.durations import by_step, estimate
from erasec.commands.plan import Plan, make_plan
from erasec.commands.speed import ASSUMED
from erasec.recipe.recipe import from_flags

SPEED = ASSUMED["cpu"][0]


def plan(options: str = "", **flags: Any) -> Plan:
    given = {"passes": [f"esd{options}"], "device": "cpu", **flags}
    return make_plan(from_flags("glyphs", ["star"], **given), Path("out"), pin=False)


@pytest.fixture
def usual(here: Path) -> dict[str, float]:
    return by_step(plan(), SPEED)


@pytest.mark.parametrize(
    ("options", "factor"),
    [(":steps=600", 1.3), (":batch=8", 1.3), (":trajectories=64", 1.1), (":sample_steps=40", 1.1)],
)
def test_more_training_takes_longer(usual: dict[str, float], options: str, factor: float) -> None:
    more = by_step(plan(options), SPEED)
    assert more["solve"] > factor * usual["solve"]
    assert {name: seconds for name, seconds in more.items() if name != "solve"} == {
        name: seconds for name, seconds in usual.items() if name != "solve"
    }


def test_a_training_that_computes_activations_again_takes_longer(usual: dict[str, float]) -> None:
    assert by_step(plan(memory="100GB"), SPEED) == usual
    peaks = [durations.solving(*_solving(rows), SPEED) for rows in (0, 2)]
    assert peaks[1] > 1.1 * peaks[0]


def _solving(rows: int) -> Any:
    from erasec.training.base import Measures

    made = plan()
    (step,), (concept,) = made.passes, made.concepts
    return step, step.work(made.model, concept), made.model, Measures(rows)


def test_minutes_end_a_training(here: Path) -> None:
    assert by_step(plan(":minutes=0.1"), SPEED)["solve"] == 6.0


def test_a_target_adds_its_export_and_the_number_of_pictures_counts(usual: dict[str, float]) -> None:
    onnx, ldm = (by_step(plan(targets=[name]), SPEED).keys() - usual.keys() for name in ("onnx", "ldm"))
    assert onnx == {"export onnx", "pictures of what was written"} and ldm == {"export ldm"}
    made = plan()
    more = by_step(replace(made, painting=replace(made.painting, images=32)), SPEED)
    assert more["pictures and judge"] > 1.5 * usual["pictures and judge"]


@pytest.mark.parametrize(("field", "steps"), [("operations", {"solve"}), ("disk", {"merge and write"})])
def test_a_faster_device_takes_less(usual: dict[str, float], field: str, steps: set[str]) -> None:
    faster = by_step(plan(), replace(SPEED, **{field: 10 * getattr(SPEED, field)}))
    assert all(faster[step] < usual[step] for step in steps)
    assert all(faster[step] <= usual[step] for step in usual)


def test_the_range_is_in_order_and_the_steps_sum_up(here: Path) -> None:
    time = estimate(plan())
    assert time["range"][0] < time["range"][1]
    assert time["range"] == [pytest.approx(sum(each[end] for each in time["steps"].values())) for end in (0, 1)]
    assert "not measured on this machine" in time["how"]


def test_a_closed_form_pass_takes_less_than_a_training(usual: dict[str, float]) -> None:
    assert by_step(plan(passes=["uce"]), SPEED)["solve"] < 0.2 * usual["solve"]
