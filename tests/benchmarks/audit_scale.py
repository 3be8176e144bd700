"""An audit at Stable Diffusion 1.4's full size, on random weights: seconds of each probe, and the peak of memory.

    python tests/benchmarks/audit_scale.py                       writes tests/benchmarks/results/audit_scale.json
    ... --device cuda --suite standard --images 20 --steps 15 --pixels 0     on a GPU, at the model's own size
    ... --source ldm                                             the same audit of a single file

`uce` erases nudity from a random model, and `erasec audit` with the judge nudenet attacks the result in a process of
its own. Random weights show nothing, so the audit must end without a verdict; what is measured is its cost. By default
pictures are small, steps few, and one picture is counted for each rate. ``probes`` has the seconds of each on all
subjects: the model, its random control, its base and an untrained denoiser.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import machine
import random_models

from erasec import registry
from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.model import loading
from erasec.passes.uce import Uce
from erasec.recipe import concept

RESULT = Path(__file__).parent / "results" / "audit_scale.json"
# The quick suite, with a few steps of each search.
PROBES = ("prompts", "noised", "completion", "undo", "inversion:steps=4", "free_states:steps=4")


def edited(base: Path, out: Path, source: str) -> Path:
    """The base without nudity, erased by `uce`: a folder, or the single file of it."""
    model, context = loading.load(str(base)), Context()
    edit = Uce().solve(model, concept.find("nudity"), context)
    model.source.write(out / "hf", model.with_edit(edit).merged(), link=True)
    if source == "hf":
        return out / "hf"
    registry.load_target("ldm")().export(Folder(out / "hf"), out / "ldm", context)
    return next((out / "ldm").glob("*.safetensors"))


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    base, page = scratch / "sd14", scratch / "audit"
    random_models.random_folder(base, "sd1", options.size, dtype="float16")
    command = [sys.executable, "-m", "erasec", "audit", str(edited(base, scratch, options.source))]
    command += ["--base", str(base), "--concept", "nudity", "--judge", "nudenet", "--out", str(page)]
    command += ["--images", str(options.images), "--steps", str(options.steps)]
    command += ["--suite", options.suite] if options.suite else [f"--probe={probe}" for probe in PROBES]
    command += ["--size", str(options.pixels), "--device", options.device]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "ERASEC_CACHE": str(scratch / "cache")})
    seconds, facts = time.perf_counter() - start, json.loads((page / "audit.json").read_text())
    probes: dict[str, float] = defaultdict(float)
    for row in facts["readings"]:
        probes[row["probe"]] += row["seconds"]
    return {
        "seconds": seconds,
        "probes": probes,
        "rows": len(facts["readings"]),
        "not_run": {row["probe"]: row["obstacle"] for row in facts["readings"] if row["obstacle"]},
        "outcome": facts["outcome"],
        "page_bytes": (page / "audit.html").stat().st_size,
        "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="", help="a whole suite instead of a few steps of the quick one")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=64, help="longest side of pictures; 0 is the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--source", choices=("hf", "ldm"), default="hf", help="what of the build is audited")
    parser.add_argument("--size", default="full", help="the model: full, or tiny for a trial")
    parser.add_argument("--scratch", type=Path, help="the folder for the model and the build, 10 GB at full size")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        row = measure(Path(scratch), options)
    kept = {name: getattr(options, name) for name in ("suite", "images", "steps", "pixels", "device", "size")}
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result[options.source] = {**row, **kept, "machine": machine.about()}
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
