"""Erase each of the ten shapes in turn with every closed-form pass and measure what went and what stayed.

    python tests/benchmarks/closed_form_glyphs.py      writes tests/benchmarks/results/closed_form_glyphs.json
    ... --jobs 2                                       two shapes at a time, each with one thread
    ... --shapes star --passes uce --picture docs/star.png     also draws pictures of each group, before and after

Every pass at its shipped defaults erases the concept as bundled, synonyms and all templates. "one word" erases the name
alone in the template "{}", keep phrases as bundled: then no row of the system speaks of synonyms, implicit prompts or
other contexts, and what happens to them shows how far a method reaches.
Judge B, same prompts and seeds before and after: 30 by name, 30 by synonym, 16 implicit, 6 for every other shape.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import strips

from erasec.attention.pipeline import Sampling, generate
from erasec.base import Context, Question
from erasec.commands import settings
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge
from erasec.model import loading
from erasec.recipe import concept
from erasec.recipe.recipe import Limits, parse_named_options

if TYPE_CHECKING:
    from erasec.base import Images

RESULT = Path(__file__).parent / "results" / "closed_form_glyphs.json"
COUNTS = {"name": 30, "synonym": 30, "implicit": 16}
DRAWN = {"name": ("by name", 3), "synonym": ("by synonym", 2), "implicit": ("implied", 2), "keep": ("the rest", 9)}
KEPT_EACH = 6
ONE_WORD = ", one word"
PASSES = ("uce", "uce:rows=last", "rece", "mace", "trce.remap")
PASSES += ("uce" + ONE_WORD, "uce:rows=last" + ONE_WORD, "trce.remap" + ONE_WORD)


def questions(panel: tuple[Question, ...]) -> list[Question]:
    """The first few of each group, and of each kept shape."""
    chosen = [q for group, count in COUNTS.items() for q in [q for q in panel if q.group == group][:count]]
    for shape in world.SHAPES:
        chosen += [q for q in panel if q.group == "keep" and q.looked_for == shape][:KEPT_EACH]
    return chosen


def drawn(panel: list[Question], before: Images, after: Images) -> dict[str, list[tuple[Any, Any]]]:
    """The first few pictures of each group, not chosen, before and after; of what is kept, the first of each shape."""
    groups: dict[str, list[tuple[Any, Any]]] = {}
    for group, (title, count) in DRAWN.items():
        members = [i for i, q in enumerate(panel) if q.group == group]
        if group == "keep":
            members = [
                next(i for i in members if panel[i].looked_for == s) for s in {panel[i].looked_for: 0 for i in members}
            ]
        groups[title] = [(before[i], after[i]) for i in members[:count]]
    return groups


def measure(
    shape: str, passes: list[str], chosen: dict[str, Any], sampling: Sampling, seed: int, picture: Path | None
) -> dict[str, dict[str, Any]]:
    base, item, judge = loading.load("glyphs"), concept.find(shape, "glyphs"), GlyphJudge()
    panel = questions(judge.panel(item, max(COUNTS.values()), seed))
    prompts, seeds = [q.prompt for q in panel], [q.seed for q in panel]
    before = generate(base.source.root, prompts, seeds, sampling, f"{shape} before")
    rates = {}
    for name in passes:
        use = parse_named_options(name.removesuffix(ONE_WORD))
        bare = {"synonyms": (), "templates": ("{}",)} if name.endswith(ONE_WORD) else {}
        use = use.model_copy(update={"options": {**use.options, **chosen}})
        step = settings.settle([use], [item], settings.defaults_of(base))[0].step
        edit = step.solve(base, item.model_copy(update=bare), Context(seed=seed))
        with tempfile.TemporaryDirectory() as scratch:
            base.source.write(Path(scratch) / "hf", base.with_edit(edit).merged())
            after = generate(Path(scratch) / "hf", prompts, seeds, sampling, f"{shape} {name}")
        if picture:
            strips.draw(picture, drawn(panel, before, after), world.SIZE)
        labels = [q.looked_for for q in panel]
        shown = judge.sees(before, labels), judge.sees(after, labels)
        row: dict[str, Any] = {"stats": dict(edit.stats)}
        for group in (*COUNTS, "keep"):
            rows = np.array([q.group == group for q in panel])
            if rows.any():
                row[group] = [float(shown[0][rows].mean()), float(shown[1][rows].mean()), int(rows.sum())]
        rates[name] = row
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(world.SHAPES), choices=list(world.SHAPES))
    parser.add_argument("--passes", nargs="*", default=list(PASSES))
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--option", nargs="*", default=[], help="pass options, key=value, instead of the defaults")
    parser.add_argument("--picture", type=Path, help="draw before and after of the last shape and pass to this PNG")
    parser.add_argument("--out", type=Path, help="JSON to write (default: RESULT when everything is measured)")
    options = parser.parse_args()
    chosen = parse_named_options("x:" + ",".join(options.option)).options if options.option else {}
    limits, judge = Limits(), GlyphJudge()
    given = (options.passes, chosen, Sampling(limits.steps, limits.guidance), options.seed, options.picture)
    rows: dict[str, Any] = {}
    print("| erased | pass | by name | by synonym | implicit | other shapes |\n|---|---|---|---|---|---|")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {shape: pool.submit(measure, shape, *given) for shape in options.shapes}
        for shape, future in running.items():
            rows[shape] = future.result()
            for name, row in rows[shape].items():
                cells = [f"{row[g][0]:.0%} → {row[g][1]:.0%}" if g in row else "-" for g in (*COUNTS, "keep")]
                print(f"| {shape} | {name} | {' | '.join(cells)} |", flush=True)
    result = {
        "rows": rows,
        "options": chosen,
        "seed": options.seed,
        "judge": f"{judge.title} {judge.digest}",
        "sampling": f"{limits.steps} steps, guidance {limits.guidance}",
        "machine": platform.machine(),
    }
    whole = options.shapes == list(world.SHAPES) and options.passes == list(PASSES) and not options.option
    out = options.out or (RESULT if whole else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
