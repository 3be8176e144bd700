"""Judges look at pictures: prompts become images, images become hit rates.

A judge is whatever can say which of its labels is in a picture. It also knows what to ask: the panel of questions for
a concept. erasec ships the judge of glyphs; other models have none yet, and a build then says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

Images = NDArray[np.uint8]
BATCH = 32


@dataclass(frozen=True)
class Question:
    """One picture to make and one label to look for; ``group`` is "name", "synonym", "implicit" or "keep"."""

    group: str
    prompt: str
    seed: int
    looked_for: str
    colour: str = ""


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: the checkpoint's own scheduler, ``steps`` and classifier-free guidance."""

    steps: int
    guidance: float
    device: str = "cpu"


class Judge(Protocol):
    """``name`` and ``digest`` (sha256 of its weights) identify it in every check that it decides."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        """The questions for one concept, ``images`` a group; empty where the judge has no label for it."""

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each image (n, h, w, 3) shows its own label, (n,)."""

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        """Where each image shows the label: (left, top, right, bottom) in pixels, the last two exclusive, (n, 4)."""

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Cosine of each image with its prompt, as a CLIP score has it, (n,)."""


def adviser(model: Model) -> Judge | None:
    """The judge that a pass may be tuned by: never the one that decides a build's checks. None for most models."""
    from erasec.glyphs.judging import GlyphJudge

    return GlyphJudge.for_model(model, "a")


def generate(folder: Path, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, title: str) -> Images:
    """Images (n, h, w, 3) as a folder's user gets them, extras and all, each from its own seed, whatever its batch."""
    import torch

    from erasec.attention.processors import pipeline as made_from

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = made_from(folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False).to(
            sampling.device
        )
    pipeline.set_progress_bar_config(disable=True)
    chunks = []
    with bar(title, len(prompts)) as advance:
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            images = pipeline(
                part,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + BATCH]],
                output_type="np",
            ).images
            chunks.append(np.rint(np.nan_to_num(images) * 255).astype(np.uint8))
            advance(len(part))
    return np.concatenate(chunks)
