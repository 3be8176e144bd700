"""Estimates of the memory and the disk space of a build, before it runs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.disk import existing, free_bytes, size
from erasec.checkpoint.store import cache_folder
from erasec.errors import ErasecError
from erasec.training.base import Learned
from erasec.training.measures import describe, parse_memory, peak, unlimited
from erasec.training.processes import process_count

if TYPE_CHECKING:
    from erasec.base import Output
    from erasec.commands.plan import Plan
    from erasec.model.view import Model

# Closed-form solving holds five d x d float64 matrices for each stream: a system, its two sides, the solution, a copy.
MATRICES = 5


def free_memory(device: str) -> int:
    """The bytes that a GPU has free; 0 for a CPU, whose memory trainings use without a limit, and for processes that
    train together, which must all take the same measures."""
    if not device.startswith("cuda") or process_count() > 1:
        return 0
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def memory(plan: Plan) -> dict[str, Any]:
    """Bytes held at the same time in each step and in the largest, estimated from the sizes of tensors, with what
    learned passes do to fit a limit (``measures``, by pass), and that limit (0 for none)."""
    model = plan.model
    counts = {component: model.count(component) for component in model.family.components}
    text = 4 * sum(counts[component] for component in model.family.text_encoders)
    widths = [sites[0].shape[1] for sites in model.streams.values()]
    sizes = {step: [math.prod(site.shape) for site in step.sites(model)] for step in plan.passes}
    steps = {
        "solve": text + 8 * sum(MATRICES * width**2 for width in widths),
        "merge": 8 * max((size for step_sizes in sizes.values() for size in step_sizes), default=0),
    }
    taken = {
        step.name: (step, measures or unlimited(model))
        for step, measures in zip(plan.passes, plan.measures, strict=True)
        if isinstance(step, Learned)
    }
    if taken:
        peaks = (peak(step, model, plan.concepts, plan.context.device, each) for step, each in taken.values())
        steps["train"] = int(max(peaks))
    if plan.painting or plan.files.pictures:
        steps["pictures"] = 4 * sum(counts.values())
    if len(plan.targets) > 1:
        steps["export"] = 2 * 4 * max(counts.values())
    return {
        "bytes": max(steps.values()),
        "steps": steps,
        "measures": {name: describe(each) for name, (_, each) in taken.items()},
        "limit": parse_memory(plan.recipe.memory) or free_memory(plan.context.device),
        "how": "estimate: text encoders and pictures in float32; five square matrices for each stream of text states "
        "and one merged tensor in float64; an exported component twice; a training with its activations, gradients, "
        "moments and libraries; pictures need more for their activations",
    }


def output_bytes(targets: Sequence[Output], model: Model) -> int:
    """The bytes that a build writes into its output folder, as its targets estimate them."""
    return sum(target.size(model) for target in targets)


def disks(targets: Sequence[Output], model: Model, out: Path) -> list[dict[str, Any]]:
    """The disks that a build writes to, that of ``out`` first: what is written to each, the bytes, and those free.

    ``optional`` are the bytes of the cache, without which a build goes on. What is in the cache already is counted too:
    nothing is read to find out.
    """
    graphs = sum(target.cached(model) for target in targets)
    places = [("output", out, output_bytes(targets, model)), ("temporary files", Path(tempfile.gettempdir()), graphs)]
    with suppress(OSError):  # without a home directory there is no cache
        places.append(("cache", cache_folder(), graphs))
    disks: dict[int, dict[str, Any]] = {}
    for what, path, needed in places:
        if needed or path == out:
            item = {"what": what, "path": str(path), "needed": 0, "optional": 0, "free": free_bytes(path)}
            first = disks.setdefault(existing(path).stat().st_dev, item)
            if first is not item:
                first["what"] += f", {what}"
            first["needed"] += needed
            first["optional"] += needed * (what == "cache")
    return list(disks.values())


def check_disks(disks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence where a disk has no room for the cache. Raises ErasecError where one has too little for the rest."""
    remarks = []
    for disk in disks:
        short = disk["needed"] - disk["free"]
        if short > disk["optional"]:
            raise ErasecError(
                f"the disk of {disk['path']} has too little room",
                why=f"about {size(disk['needed'])} will be written ({disk['what']}), {size(disk['free'])} are free",
                fix=f"free {size(short)} more, or use another disk: --out for the output, "
                "TMPDIR for temporary files, ERASEC_CACHE for the cache",
            )
        if short > 0:
            remarks.append(
                f"The disk of {disk['path']} has no room for the cache ({size(short)} more are needed): what it would "
                "hold is made again in every build. ERASEC_CACHE names another folder."
            )
    return tuple(remarks)
