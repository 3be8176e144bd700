"""How many steps pictures of the reference worlds need: writes results/painting.json.

    python tests/benchmarks/painting.py

``steps`` are the shares of pictures in which judge B sees what the prompt asks for, of the base and after ``uce``, for
several numbers of steps of the model's own scheduler: a build judges with ``WORLD_STEPS``. ``colours`` are those that
prompts name.
"""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine
import numpy as np

from erasec import registry
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


def main() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        result: dict[str, Any] = {"steps": {}}
        for world, name in CASES:
            result["steps"][f"{world}, {name}"] = pool.submit(by_steps, world, name).result()
    result.update(seed=SEED, images=IMAGES, threads=1, machine=machine.about())
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["steps"], indent=2))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
