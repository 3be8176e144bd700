"""Which pictures a build paints and how, and painting them before and after the edit. A plan imports no torch here."""

from __future__ import annotations

import math
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erasec.attention.sampling import LARGE, Sampling, unsupported
from erasec.checkpoint.disk import size
from erasec.judging import picture_cache
from erasec.model.available import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from erasec.base import Images, Judge, Question
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.recipe.recipe import Limits

# The defaults for pictures that no judge looks at. On a GPU they are as many as a judge gets, with as many steps.
MINUTES = 10.0
CPU_PICTURES, CPU_PICTURES_LARGE = 2, 1  # prompts for each group on a CPU: of small models, of large ones
CPU_STEPS = 4
CPU_JUDGED = {"images": 2, "steps": 10}  # the checks of a large model on a CPU: few pictures, that a judge can read
CPU_SIDE = 512  # pixels
# Steps of the checks of a reference world whose model has its own DPM-Solver++: the judges see as much as after 15
# (tests/benchmarks/painting.py).
WORLD_STEPS, WORLD_SCHEDULER = 8, "DPMSolverMultistepScheduler"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# All concepts together have this many pictures in each group, where each would otherwise have 16; at least LEAST each.
ALL, LEAST = 128, 2
SPARE = 1.2  # memory over that of the weights: activations, and a component that is read while another one is held


@dataclass(frozen=True)
class Painting:
    """The pictures that a build paints before and after the edit.

    ``images`` prompts of each group are for the judge, if it is ``judged`` at all; ``pictures`` of each group are about
    concepts that no judge can see. Painting stops after ``minutes``, if there is a limit; for a judge there is none.
    ``obstacle`` says why no pictures can be painted; "" if they can.
    """

    judged: bool
    images: int
    pictures: int
    sampling: Sampling
    minutes: float | None = None
    obstacle: str = ""

    def __bool__(self) -> bool:
        """Whether anything is painted."""
        return self.judged or bool(self.pictures and not self.obstacle)

    @property
    def text(self) -> str:
        """A description of what is painted and how."""
        if not self:
            return f"none: {self.obstacle or 'the build was given pictures = 0'}"
        sampling = self.sampling
        pixels = f"at most {sampling.side} pixels" if sampling.side else "the size of the model"
        how = f"{sampling.steps} steps, guidance {sampling.guidance:g}, {pixels}, {sampling.where}"
        if self.judged:
            return f"{self.images} for each group of prompts that the judge looks at, {how}"
        return f"{self.pictures} for each group of prompts, {how}, for at most {self.minutes:g} minutes"


def affordable(limits: Limits, model: Model, device: str, concepts: int = 1, world: bool = False) -> Limits:
    """The limits of a build's checks. Where a CPU paints a large model, ``images`` and ``steps`` that the recipe does
    not set are ``CPU_JUDGED``: sixteen pictures for each group would take hours. A model of a reference ``world`` has
    ``WORLD_STEPS``. Of many ``concepts``, each has fewer pictures, so that all of them together have at least ``ALL``
    in each group."""
    usual: dict[str, int] = CPU_JUDGED if device == "cpu" and _is_large(model) else {}
    if world and model.source.index.get("scheduler", [None, None])[1] == WORLD_SCHEDULER:
        usual = {"steps": WORLD_STEPS}
    images = usual.get("images", limits.images)
    if concepts * images > ALL:
        usual = {**usual, "images": max(LEAST, -(-ALL // concepts))}
    return limits.model_copy(update={k: v for k, v in usual.items() if k not in limits.model_fields_set})


def _is_large(model: Model) -> bool:
    return model.count(model.family.denoiser) > LARGE


def plan_painting(
    model: Model, judge: Judge | None, concepts: Sequence[Concept], limits: Limits, device: str
) -> Painting:
    """The pictures of a build of ``model``: for the judge where it can see anything, otherwise for people to look at.

    On a CPU a person gets few pictures, in few steps.
    """
    large, cpu = _is_large(model), device == "cpu"
    dtype = _dtype(device) if large else "float32"
    pictures = limits.pictures
    if pictures is None:
        pictures = (CPU_PICTURES_LARGE if large else CPU_PICTURES) if cpu else limits.images
    if judge is not None and any(q.looked_for for concept in concepts for q in judge.panel(concept, 1, 0)):
        return Painting(True, limits.images, pictures, Sampling(limits.steps, limits.guidance, device, dtype))
    sampling = Sampling(
        limits.picture_steps or (min(CPU_STEPS, limits.steps) if cpu else limits.steps),
        limits.guidance,
        device,
        dtype,
        limits.picture_size or (CPU_SIDE if cpu else 0),
    )
    needed = int(SPARE * BYTES[dtype] * sum(map(model.count, model.family.components)))
    free = available_memory()
    obstacle = unsupported(model.source.index.get("_class_name"))
    if not obstacle and free is not None and needed > free:
        obstacle = f"the model needs about {size(needed)} of memory, {size(free)} are free"
    return Painting(False, limits.images, pictures, sampling, limits.picture_minutes or MINUTES, obstacle)


def _dtype(device: str) -> str:
    """The type for a large model: half precision on a GPU that computes with it, and float32 elsewhere."""
    if not device.startswith("cuda"):
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def paint_pairs(
    base: Path,
    built: Path,
    questions: Sequence[Question],
    sampling: Sampling,
    minutes: float = math.inf,
    variant: str = "",
    cache: str = "",
    watch: Callable[[Images], object] | None = None,
) -> tuple[list[int], Images, Images]:
    """Indices of the questions that were painted, in their order, and the pictures before and after the edit.

    Painting takes about ``minutes``; if they are not enough for all questions, all groups get their turn, and one batch
    is painted in any case. ``variant`` is that of the base's weights. ``cache`` is the identity of the base in the
    cache of pictures (``picture_cache.identity``); with "" nothing is cached. ``watch`` is called with each batch in
    another thread, while the next batch is painted; its errors are raised here.
    """
    order, start = list(range(len(questions))), time.monotonic()
    if math.isfinite(minutes):
        order = _by_turns(questions)
    names = {row: picture_cache.key(cache, questions[row], sampling) for row in order} if cache else {}
    before = {row: picture for row, name in names.items() if (picture := picture_cache.load(name)) is not None}
    missing = [row for row in order if row not in before]
    with ThreadPoolExecutor(1) as executor:
        looks: list[Future[object]] = []

        def look(pictures: Mapping[int, NDArray[np.uint8]]) -> None:
            if watch and pictures:
                looks.append(executor.submit(watch, np.stack([*pictures.values()])))

        def store_and_look(pictures: Mapping[int, NDArray[np.uint8]]) -> None:
            for row in pictures.keys() & names.keys():
                picture_cache.store(names[row], pictures[row])
            look(pictures)

        look(before)
        end = start + 30 * minutes
        before |= _paint(base, questions, missing, sampling, "pictures before", end, store_and_look, variant)
        rows = [row for row in order if row in before]
        after = _paint(built, questions, rows, sampling, "pictures after", start + 60 * minutes, look)
        for each in looks:
            each.result()
    rows = sorted(after)
    return rows, np.stack([before[row] for row in rows]), np.stack([after[row] for row in rows])


def _paint(
    folder: Path,
    questions: Sequence[Question],
    rows: Sequence[int],
    sampling: Sampling,
    title: str,
    end: float,
    done: Callable[[Mapping[int, NDArray[np.uint8]]], None],
    variant: str = "",
) -> dict[int, NDArray[np.uint8]]:
    """The pictures of the first of ``rows``, as many as are painted until ``end``, and one batch in any case. ``done``
    is called with those of each batch, by row."""
    from erasec.attention.pipeline import paint

    pictures: dict[int, NDArray[np.uint8]] = {}
    if not rows:
        return pictures
    prompts, seeds = [questions[row].prompt for row in rows], [questions[row].seed for row in rows]
    for batch in paint(folder, prompts, seeds, sampling, title, variant):
        new = dict(zip(rows[len(pictures) :], batch, strict=False))
        pictures |= new
        done(new)
        if time.monotonic() > end:
            break
    return pictures


def _by_turns(questions: Sequence[Question]) -> list[int]:
    """Indices of the questions: the first of each group, then the second of each group, and so on."""
    turns, counts = [], Counter[str]()
    for row, question in enumerate(questions):
        turns.append((counts[question.group], row))
        counts[question.group] += 1
    return [row for _, row in sorted(turns)]
