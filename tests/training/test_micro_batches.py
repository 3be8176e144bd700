"""A micro-batch changes the memory of a training and not its result, whatever the losses of the pass are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from erasec import registry
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.options import configure
from erasec.recipe import concept as concepts
from erasec.training.base import Learned, Measures, TrainingContext

SMALL: dict[str, int | str | float] = {
    "steps": 2,
    "trajectories": 2,
    "sample_steps": 2,
    "images": 3,
    "min_cosine": 0.0,
    "max_rise": 0.0,
}
# The watermark is in images of glyphs; safegen and geom_erasing need images that show what they erase.
CONCEPTS = {"geom_erasing": "watermark"}
LEARNED = [name for name in sorted(registry.passes()) if issubclass(registry.load_pass(name), Learned)]


@cache
def solved(name: str, batch: int, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the pass trains in two steps, by name."""
    kind = registry.load_pass(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    options: dict[str, Any] = {key: value for key, value in SMALL.items() if key in known} | {"batch": batch}
    if name in CONCEPTS | {"safegen": ""}:
        options |= {"images": 16, "sample_steps": 8}
    context = TrainingContext("cpu", seed, measures=Measures(rows) if rows else None)
    concept = concepts.find(CONCEPTS.get(name, "star"), "glyphs")
    edit = configure(kind, options, name).solve(loading.load("glyphs"), concept, context)
    return tensors(edit)


def tensors(edit: Edit) -> dict[str, torch.Tensor]:
    found = {site.key: getattr(delta, "value", None) for site, delta in edit.deltas.items()}
    result = {key: value for key, value in found.items() if value is not None}
    if edit.secret:
        result |= {"k_rows": edit.secret.k_rows, "v_rows": edit.secret.v_rows}
    return result | edit.tokens


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors, relative to that of the first."""
    assert first.keys() == second.keys() and first
    moved = sum(float((first[key].double() - second[key].double()).square().sum()) for key in first)
    return float((moved / sum(float(value.double().square().sum()) for value in first.values())) ** 0.5)


@pytest.mark.parametrize("name", LEARNED)
def test_a_pass_gives_the_same_edit_in_micro_batches(name: str) -> None:
    whole = solved(name, 4, 0)
    print(name, [distance(whole, solved(name, 4, rows)) for rows in (1, 2, 4)], distance(whole, solved(name, 2, 0)))
