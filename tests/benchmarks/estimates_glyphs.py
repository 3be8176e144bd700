"""What a plan says of the time of a build, and what the build takes: builds of glyphs, and an older one of anything.

    python tests/benchmarks/estimates_glyphs.py       writes tests/benchmarks/results/estimates_glyphs.json

The device is measured first, as erasec doctor --measure does it. A row has the estimated range and the measured seconds
of each step, and the ratio of the measured time to the middle of the range.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import machine

from erasec.commands import build, durations, speed
from erasec.commands.plan import make_plan
from erasec.errors import CheckFailed
from erasec.recipe.recipe import from_flags

RESULT = Path(__file__).parent / "results" / "estimates_glyphs.json"
ROWS = ("esd", "trce")


def compare(name: str, out: Path) -> dict[str, Any]:
    """The row of a build of glyphs without star by this pass, for which the checks need not pass."""
    plan = make_plan(from_flags("glyphs", ["star"], passes=[name], targets=["onnx"], device="cpu"), out, pin=False)
    estimated = durations.estimate(plan)
    try:
        seconds = build.run(plan, fresh=True).seconds
    except CheckFailed as error:
        seconds = json.loads((Path(error.where) / "report.json").read_text())["seconds"]
    steps = {
        step: {"estimated": estimated["steps"].get(step), "seconds": round(value, 2)} for step, value in seconds.items()
    }
    total = sum(seconds.values())
    middle = sum(estimated["range"]) / 2
    return {"range": estimated["range"], "seconds": total, "ratio": total / middle, "steps": steps}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="passes with options, as for --pass")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    measured = speed.measure("cpu")
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(chosen.rows):
            rows[name] = compare(name, Path(scratch) / str(number))
            print(name, json.dumps(rows[name]), flush=True)
    content = {"rows": rows, "speed": speed.describe(measured), "machine": machine.about()}
    chosen.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
