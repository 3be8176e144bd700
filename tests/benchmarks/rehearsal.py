"""A rehearsal of the whole line at Stable Diffusion 1.4's full size, on random weights: time and peak of each phase.

    python tests/benchmarks/rehearsal.py                       writes tests/benchmarks/results/rehearsal.json
    ... --targets onnx --out FILE                              without engines
    ... --device cuda --options "" --pictures 15               on a GPU, with the pass's own settings
    ... --family sdxl --pass uce --options "" --targets onnx --pictures 0 --out FILE   another family

The command is erasec build sd14 --erase nudity with the default pass for it, two steps for each stage, pictures of two
sampler steps at the model's own size, and the judge nudenet where this machine has it. It runs in one process. The peak
of a phase is the largest resident size in it, libraries and what earlier phases left included; on a GPU torch's largest
allocation is beside it. The folder of the build is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import random_models

from erasec import registry

RESULT = Path(__file__).parent / "results" / "rehearsal.json"
OPTIONS = "steps=2,batch=1,trajectories=1,sample_steps=2"
LIMIT = 16e9
# Runs the build with the peak of every phase. _timed and _solve are the places where build.py measures its seconds.
CODE = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
from erasec.commands import build, plan
from erasec.errors import CheckFailed
from erasec.recipe.recipe import from_file

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    gpu = {}
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        gpu = {"peak_gpu_gb": sys.modules["torch"].cuda.max_memory_allocated() / 1e9}
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    return {"peak_gb": int(line.split()[1]) * 1024 / 1e9, **gpu}

def reset():
    Path("/proc/self/clear_refs").write_text("5")

phases, timed, solve = {}, build._timed, build._solve

@contextmanager
def measured(seconds, step):
    reset()
    with timed(seconds, step):
        yield
    phases[step] = peak()
    print(step, phases[step], round(seconds[step], 1), flush=True)

def solved(*args):
    reset()
    result = solve(*args)
    phases["solve"] = peak()
    print("solve", phases["solve"], flush=True)
    return result

build._timed, build._solve = measured, solved
made = plan.make_plan(from_file(Path(sys.argv[1])), Path(sys.argv[2]))
rejected = ""
try:
    build.run(made)
except CheckFailed as error:
    rejected = str(error)
folder = made.out / ".rejected" if rejected else made.out
report = json.loads((folder / "report.json").read_text())
for step, row in phases.items():
    row["seconds"] = report["seconds"][step]
    row["estimated"] = report["estimated"].get(step)
Path(sys.argv[3]).write_text(json.dumps({"phases": phases, "rejected": rejected, "report": {
    "verdict": report["verdict"], "checks": len(report["checks"]), "failed": report["failed"], "pairs":
    len(report["pairs"]), "page_bytes": (folder / "report.html").stat().st_size}}))
"""


def recipe(model: Path, targets: list[str], name: str, options: str, device: str, pictures: int, memory: str) -> str:
    """The recipe of the build, as TOML."""
    judge = "nudenet" if "nudenet" in registry.judges() and pictures else ""
    values = (option.split("=") for option in options.split(",") if option)
    lines = [
        f'model = "{model}"',
        'erase = ["nudity"]',
        f"targets = {json.dumps(targets)}",
        f'device = "{device}"',
        f'memory = "{memory}"',
        f'judge = "{judge}"',
        "link = true",
        "[[pass]]",
        f'name = "{name}"',
        "[pass.options]",
        *(f"{key} = {value}" for key, value in values),
        "[checks]",
        *([f"steps = {pictures}", "images = 1"] if pictures else ["pictures = 0"]),
    ]
    return "\n".join(lines) + "\n"


def rehearse(scratch: Path, family: str, size: str, **chosen: Any) -> dict[str, Any]:
    """One build of a random model of this ``family`` and ``size``; the facts that it leaves."""
    model = scratch / {"sd1": "sd14"}.get(family, family)
    random_models.random_folder(model, family, size, dtype="float32" if family == "sd1" else "float16")
    (scratch / "recipe.toml").write_text(recipe(model, **chosen))
    files = [str(scratch / name) for name in ("recipe.toml", "out", "facts.json")]
    own = {**os.environ, "ERASEC_CACHE": str(scratch / "cache")}  # nothing is taken from earlier builds
    subprocess.run([sys.executable, "-c", CODE, *files], check=True, env=own)
    facts: dict[str, Any] = json.loads((scratch / "facts.json").read_text().replace(f"{scratch}/", ""))
    return facts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=["onnx", "trt-rtx"])
    parser.add_argument("--family", default="sd1", choices=["sd1", "sd2", "sdxl"])
    parser.add_argument("--pass", default="trce", dest="name")
    parser.add_argument("--options", default=OPTIONS, help="options of the pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="")
    parser.add_argument("--pictures", type=int, default=2, help="sampler steps of the pictures; 0 for none")
    parser.add_argument("--size", default="full")
    parser.add_argument("--scratch", type=Path, help="the folder for the model and the build, 30 GB at full size")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = vars(parser.parse_args(arguments))
    size, out = chosen.pop("size"), chosen.pop("out")
    with tempfile.TemporaryDirectory(dir=chosen.pop("scratch")) as scratch:
        facts = rehearse(Path(scratch), size=size, **chosen)
    out.write_text(json.dumps({**facts, **chosen, "size": size, "machine": machine.about()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
