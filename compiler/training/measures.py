"""Which measures let a training fit a memory, by an estimate of its peak. Imports no torch, so that a plan is quick."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from erasec.attention.sampling import LARGE
from erasec.checkpoint.disk import parse_size, size
from erasec.errors import ErasecError
from erasec.model import operations
from erasec.training.base import Learned, Measures
from erasec.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

LIBRARIES = 0.8e9  # bytes of Python, torch and diffusers, and on a GPU of torch's context and its unused blocks


def parse_memory(text: str) -> int:
    """The bytes of a text such as "8GB"; 0 for "". Raises ErasecError where it is no size."""
    return parse_size(text, "--memory ") if text else 0


def peak(step: Learned, model: Model, concepts: Sequence[Concept], device: str, measures: Measures) -> float:
    """An estimate of the most bytes that a training holds at once on its device, on a CPU with the process itself.

    Text encoders and denoiser in full; of trained numbers a copy, a gradient and the moments of the optimizer; and the
    activations that the backward pass needs. On a GPU frozen weights are in bfloat16, and activations partly are.
    """
    trained = sum(math.prod(site.shape) for site in step.sites(model))
    cost = operations.denoiser(model)
    gpu = device.startswith("cuda")
    rows = max((step.work(model, concept).graph_rows for concept in concepts), default=0)
    held = cost.recomputed if measures.checkpointing else cost.saved
    if measures.rows:  # the activations of one part, and of the whole batch only inputs and predictions
        rows = min(rows, measures.rows)
    activations = (3 if gpu else 4) * rows * held
    weights = (2 if gpu else 4) * model.count(model.family.denoiser)
    weights += 4 * sum(map(model.count, model.family.text_encoders))
    return LIBRARIES + weights + trained * (4 + 4 + OPTIMIZERS[measures.optimizer][1]) + activations


def unlimited(model: Model) -> Measures:
    """What a training does without a limit."""
    return Measures(checkpointing=model.count(model.family.denoiser) > LARGE)


def choose(step: Learned, model: Model, concepts: Sequence[Concept], device: str, limit: int) -> Measures:
    """The first measures, in the order of the time that they cost, with which the training fits ``limit`` bytes.

    Raises ErasecError where none do.
    """
    least = math.inf
    for measures in _candidates(step, model, concepts, device):
        needed = peak(step, model, concepts, device, measures)
        if needed <= limit:
            return measures
        least = min(least, needed)
    more = [f"--memory {math.ceil(least / 1e9)}GB, if the device has as much"]
    more += [] if step.rank else [f"--pass {step.name}:rank=8, which trains fewer numbers"]
    more += ["another pass, such as the closed-form uce", "another --device"]
    raise ErasecError(
        f"{step.name} does not fit {size(limit)} of memory on {device}",
        why=f"about {size(least)} are needed at least: one row at a time, with activations computed again"
        + ("" if _has_8bit() or device == "cpu" else "; the extra erasec[memory] has optimizers that need less"),
        fix="; or ".join(more),
    )


def _candidates(step: Learned, model: Model, concepts: Sequence[Concept], device: str) -> Iterator[Measures]:
    """Measures from quick to slow: activations computed again, then smaller parts of a batch, then other optimizers."""
    rows = max((step.work(model, concept).graph_rows for concept in concepts), default=1)
    parts = []
    while rows > 1:
        rows = (rows + 1) // 2
        parts.append(rows)
    yield Measures()
    yield Measures(checkpointing=True)
    yield from (Measures(part) for part in parts)
    yield from (Measures(part, checkpointing=True) for part in parts or (1,))
    if device.startswith("cuda") and _has_8bit():  # the moments of a training on a CPU are in the memory anyway
        smallest = parts[-1] if parts else 1
        yield from (Measures(smallest, True, optimizer) for optimizer in OPTIMIZERS if OPTIMIZERS[optimizer][0])


def _has_8bit() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def describe(measures: Measures) -> str:
    """What a training does to save memory, as text for plans and reports."""
    words = ["activations computed again"] if measures.checkpointing else []
    words += [f"batches in parts of {measures.rows}"] if measures.rows else []
    words += [f"optimizer {measures.optimizer}"] if measures.optimizer != "adamw" else []
    return ", ".join(words) or "whole batches"
