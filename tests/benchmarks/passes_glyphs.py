"""Every pass at its defaults on glyphs: what goes, what stays, in how long; beside the base and the never-star model.

    python tests/benchmarks/passes_glyphs.py --jobs 2      writes tests/benchmarks/results/passes_glyphs.json
    ... --concepts star --setups esd trce+safegen          measures these rows again, and keeps the others

A row is a pass, or several joined by "+", each starting from what the one before it left, as a build does it. Rows are
written as they are finished. Every row runs in a process of its own with one thread, which the seconds and the peak of
resident memory are of; seconds are the processor's for solving alone, trajectories, pictures and teachers included, so
that what else the machine does hardly counts; a row without "wall" is an older one, whose seconds are of the clock.
Judge B, same prompts and seeds before and after: for each group as many pictures as "images" says, half as many for
every other shape. The watermark is looked for in pictures of all shapes; no prompt names it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import machine
import numpy as np

from erasec.attention.pipeline import Sampling, generate
from erasec.base import Context
from erasec.checkpoint.safetensors import atomic_write
from erasec.commands import settings
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge
from erasec.judging import evidence
from erasec.judging.evidence import Evidence
from erasec.model import loading
from erasec.model import sidecar as extras
from erasec.model.edit import Edit
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

RESULT = Path(__file__).parent / "results" / "passes_glyphs.json"
CONCEPTS = ("star", "heart", "ring")
BASE, NEVER = "base", "never-star model"
SINGLE = (
    "uce",
    "rece",
    "mace",
    "project",
    "speed",
    "double_projection",
    "cure",
    "trce.remap",
    "esd",
    "trce.steer",
    "trce",
    "kpop",
    "safegen",
    "few_shot",
    "eiup",
)
# For the star alone.
CHAINS = (NEVER, "esd:train=u", "esd+safegen", "uce+kpop", "project+harden")
WORDS = "negative prompt"  # what geom_erasing has to beat: the concept's words alone
MARKED = (BASE, WORDS, "geom_erasing")
GROUPS = ("name", "synonym", "implicit")
IMAGES, SEED = 32, 31


def shown(concept: str, scratch: Path, after: Path) -> Evidence:
    """What judge B sees before and after; the pictures before are made once for each concept."""
    base, item, judge, limits = loading.load("glyphs"), concepts.find(concept, "glyphs"), GlyphJudge(), recipe.Limits()
    sampling = Sampling(limits.steps, limits.guidance)
    panel = judge.panel(item, IMAGES, SEED)
    prompts, seeds = [question.prompt for question in panel], [question.seed for question in panel]
    kept = scratch / f"{concept}.npy"
    if not kept.exists():
        with atomic_write(kept) as temporary:
            temporary.write_bytes(generate(base.source.root, prompts, seeds, sampling, "before").tobytes())
    before = np.fromfile(kept, np.uint8).reshape(len(panel), world.SIZE, world.SIZE, 3)
    pictures = before if after == base.source.root else generate(after, prompts, seeds, sampling, "after")
    labels = [question.looked_for for question in panel]
    colours = [question.colour or question.looked_for for question in panel]
    return Evidence(
        panel,
        before,
        pictures,
        judge.sees(before, labels),
        judge.sees(pictures, labels),
        judge.sees(before, colours),
        judge.sees(pictures, colours),
        judge.agreement(before, prompts),
        judge.agreement(pictures, prompts),
    )


def measure(concept: str, setup: str, scratch: Path) -> dict[str, Any]:
    base, item = loading.load("glyphs"), concepts.find(concept, "glyphs")
    view, row, began, walled = base, dict[str, Any](), time.process_time(), time.perf_counter()
    if setup == WORDS:
        view = base.with_edit(Edit({}, "hand", (concept,), "", negative=", ".join(item.phrases)))
    elif setup not in (BASE, NEVER):
        for use in map(recipe.parse_named_options, setup.split("+")):
            step = settings.settle([use], [item], settings.defaults_of(base))[0].step
            for edit in step.solve_all(view, [item], Context(seed=SEED)):
                view = view.with_edit(edit)
                row.setdefault("stats", {})[use.name] = dict(edit.stats)
                row.setdefault("options", {})[use.name] = asdict(cast("Any", step))
        row["seconds"], row["wall"] = time.process_time() - began, time.perf_counter() - walled
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = {BASE: base.source.root, NEVER: loading.bundled_folder("glyphs-never-star")}.get(
            setup, Path(folder) / "bundle"
        )
        if setup not in (BASE, NEVER):
            base.source.write(root, view.merged(), link=True)
            extras.write_extras(root, extras.gather_extras(view.edits))
        record = shown(concept, scratch, root)
    for group in (*GROUPS, "keep"):
        rows = record.rows(group)
        if rows.any():
            seen = record.shown_before[rows].mean(), record.shown_after[rows].mean()
            row[group] = [float(seen[0]), float(seen[1]), int(rows.sum())]
    keep = record.rows("keep")
    worst = max(evidence.rates(record, "keep"), key=lambda rate: rate["before"] - rate["after"])
    coloured = keep & np.array([bool(question.colour) for question in record.questions])
    row["worst"] = [worst["looked_for"], worst["before"], worst["after"], worst["images"]]
    row["colours"] = [float(record.colour_before[coloured].mean()), float(record.colour_after[coloured].mean())]
    row["agreement"] = [float(record.agreement_before[keep].mean()), float(record.agreement_after[keep].mean())]
    row["drift"] = float(np.abs(record.after[keep].astype(np.float64) - record.before[keep]).mean() / 255)
    return row


def wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    rows = []
    for concept in options.concepts:
        own = (BASE, *SINGLE, *(CHAINS if concept == "star" else ()))
        rows += [(concept, setup) for setup in (options.setups or (MARKED if concept == "watermark" else own))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="*", default=[*CONCEPTS, "watermark"])
    parser.add_argument("--setups", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="measure only rows that the file does not have")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": {}}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    pending = wanted(options)
    if options.missing:
        pending = [(concept, setup) for concept, setup in pending if setup not in result["rows"].get(concept, {})]

    def save(concept: str, setup: str, future: Future[dict[str, Any]]) -> None:
        row = result["rows"].setdefault(concept, {})[setup] = future.result()
        cells = [
            f"{row[g][0]:.0%} → {row[g][1]:.0%}" if g in row else "-" for g in ("name", "synonym", "implicit", "keep")
        ]
        print(f"| {concept} | {setup} | {' | '.join(cells)} | {row.get('seconds', 0):.0f} s |", flush=True)
        result.update(images=IMAGES, seed=SEED, threads=1, jobs=options.jobs, machine=machine.about())
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    spawn = get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool,
    ):
        running = [(concept, setup, pool.submit(measure, concept, setup, Path(scratch))) for concept, setup in pending]
        for concept, setup, future in running:
            save(concept, setup, future)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
