"""Processor time of ``erasec plan`` on a folder of Stable Diffusion 1.4's size.

    python tests/benchmarks/plan_scale.py        writes tests/benchmarks/results/plan_scale.json; needs 4 GB of disk
    ... --keep DIR      makes the random model in DIR, or finds it there
    ... --size tiny     a model of a few MB: a trial, no benchmark

A random diffusers folder in float32. Each plan runs in a fresh process with one thread, --rounds times; the figures are
medians. "cpu" is the processor's time in user and system mode together, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import machine
from random_models import random_folder

RESULT = Path(__file__).parent / "results" / "plan_scale.json"
GOAL = 1.5  # seconds of cpu
PLANS = {
    "nudity, onnx": ("--erase", "nudity", "--target", "onnx"),
    "van-gogh, esd": ("--erase", "van-gogh", "--pass", "esd"),
    "church": ("--erase", "church"),
}


def plan(model: Path, flags: Sequence[str]) -> float:
    """Seconds of the processor for one plan in a fresh process."""
    command = [sys.executable, "-m", "erasec", "plan", str(model), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="where the model lies, and stays (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="JSON to write (default: RESULT at full size)")
    chosen = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        place = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = place / "sd14"
        if not model.exists():
            random_folder(model, "sd1", chosen.size, dtype="float32")
        size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
        for name, flags in PLANS.items():
            runs = [plan(model, flags) for _ in range(chosen.rounds)]
            rows[name] = {"cpu": statistics.median(runs), "runs": runs}
            over = "" if rows[name]["cpu"] <= GOAL else "  OVER"
            print(f"{name}: {rows[name]['cpu']:.2f} s of cpu (≤ {GOAL}){over}", flush=True)
    out = chosen.out or (RESULT if chosen.size == "full" else None)
    if out:
        content = {"rows": rows, "goal": GOAL, "bytes": size, "size": chosen.size, "machine": machine.about()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
