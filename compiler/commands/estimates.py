"""What a build will hold and how long it will take, as far as that can be said before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.training.base import Learned

if TYPE_CHECKING:
    from erasec.base import Pass
    from erasec.model.view import Model

# What solving holds of d x d numbers for each stream: a system, its two sides, its solution and a copy.
MAPS = 5
# What training holds of each trained number beside the weight itself: the teacher's, a gradient, and two moments.
COPIES = 4


def memory(model: Model, passes: Sequence[Pass], pictures: bool, more: bool) -> dict[str, Any]:
    """Bytes held at the same time in the hungriest step, and in each, from tensor sizes alone.

    ``pictures``: pictures are made and judged. ``more``: something beside the plain folder is written.
    """
    counts = {
        component: sum(math.prod(entry.shape) for entry in model.entries(component).values())
        for component in model.family.components
    }
    text = 4 * sum(counts[component] for component in model.family.text_encoders)
    widths = [sites[0].shape[1] for sites in model.streams.values()]
    sizes = {step: [math.prod(site.shape) for site in step.sites(model)] for step in passes}
    steps = {
        "solve": text + 8 * sum(MAPS * width**2 for width in widths),
        "merge": 8 * max((size for found in sizes.values() for size in found), default=0),
    }
    if trained := [sum(found) for step, found in sizes.items() if isinstance(step, Learned)]:
        steps["train"] = text + 4 * (counts[model.family.denoiser] + COPIES * max(trained))
    if pictures:
        steps["pictures"] = 4 * sum(counts.values())
    if more:
        steps["export"] = 2 * 4 * max(counts.values())
    return {
        "bytes": max(steps.values()),
        "steps": steps,
        "how": "lower estimate: weights alone (text encoders, pictures and training in float32, what is trained five "
        "times; in float64 five square maps of each stream of text states, and one merged tensor; an exported "
        "component twice); activations and the libraries come on top",
    }


def time(out: Path) -> dict[str, Any]:
    """Seconds are told only where they were measured: by an earlier build in the same place."""
    try:
        seconds = json.loads((out / "report.json").read_text(encoding="utf-8"))["seconds"]
        return {"seconds": float(sum(seconds.values())), "how": f"measured: the earlier build in {out} took this long"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"seconds": None, "how": "not known: nothing was built here before"}
