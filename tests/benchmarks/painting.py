"""How many steps and how much time pictures of the reference worlds need: writes results/painting.json.

    python tests/benchmarks/painting.py

``steps`` are the shares of pictures in which judge B sees what the prompt asks for, of the base and after ``uce``, for
several numbers of steps of the model's own scheduler: a build judges with ``WORLD_STEPS``. ``batches`` are seconds of
one processor for one picture of glyphs, in the memory formats and batches that builds could use, in one run; ``ratio``
is that of builds over one of plain tensors and batches of 32.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import numpy as np
import torch

from erasec import registry
from erasec.attention import pipeline
from erasec.attention.pipeline import Sampling, generate
from erasec.base import Context, Question
from erasec.commands import settings
from erasec.model import loading
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

RESULT = Path(__file__).parent / "results" / "painting.json"
CASES = (("glyphs", "star"), ("glyphs", "heart"), ("emoji", "strawberry"))
STEPS = (15, 10, 8, 6)
SEED, IMAGES = 41, 8


def rates(root: Path, panel: list[Question], judge: Any, steps: int) -> dict[str, float]:
    """Hit rates of the pictures of ``panel``, by group, and of the colours that prompts name."""
    images = generate(root, [q.prompt for q in panel], [q.seed for q in panel], Sampling(steps, 4.0), f"{steps} steps")
    seen = judge.sees(images, [q.looked_for for q in panel])
    groups = np.array([q.group for q in panel])
    result = {group: round(float(seen[groups == group].mean()), 3) for group in sorted(set(groups))}
    coloured = [row for row, question in enumerate(panel) if question.colour]
    if coloured:
        colours = judge.sees(images[coloured], [panel[row].colour for row in coloured])
        result["colours"] = round(float(colours.mean()), 3)
    return result


def by_steps(world: str, name: str) -> dict[str, Any]:
    """Rates before and after ``uce``, by the number of steps."""
    base, item = loading.load(world), concepts.find(name, world)
    judge = registry.judge_for(base, world)
    assert judge is not None
    panel = list(judge.panel(item, IMAGES, SEED))
    step = settings.settle([recipe.parse_named_options("uce")], [item], settings.defaults_of(base))[0].step
    view = base
    for edit in step.solve_all(base, [item], Context(seed=SEED)):
        view = view.with_edit(edit)
    with tempfile.TemporaryDirectory() as folder:
        edited = Path(folder) / "edited"
        base.source.write(edited, view.merged(), link=True)
        return {
            str(steps): {
                "base": rates(base.source.root, panel, judge, steps),
                "uce": rates(edited, panel, judge, steps),
            }
            for steps in STEPS
        }


def seconds(batch: int, plain: bool) -> float:
    """Processor seconds for one picture of glyphs, of 32 in four steps."""
    root = loading.bundled_folder("glyphs")
    with (
        patch.object(pipeline, "BATCH", batch),
        patch.object(pipeline, "LARGE_BATCH", {"cpu": batch}),
        patch.object(pipeline, "_is_small", lambda _: not plain),
    ):
        generate(root, ["a star"] * 2, [0, 1], Sampling(2, 4.0), "warm")
        began = time.process_time()
        generate(root, ["a star"] * 32, [*range(32)], Sampling(4, 4.0), f"batches of {batch}")
    return (time.process_time() - began) / 32


def batches() -> dict[str, float]:
    torch.set_num_threads(1)
    rows = {
        f"{'plain' if plain else 'channels last'}, {batch}": seconds(batch, plain)
        for plain in (True, False)
        for batch in (8, 16, 32)
    }
    return {**rows, "ratio": rows[f"channels last, {pipeline.BATCH}"] / rows["plain, 32"]}


def main() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        result: dict[str, Any] = {"batches": pool.submit(batches).result(), "steps": {}}
        for world, name in CASES:
            result["steps"][f"{world}, {name}"] = pool.submit(by_steps, world, name).result()
    result.update(seed=SEED, images=IMAGES, threads=1, machine=machine.about())
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("batches", "steps")}, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
