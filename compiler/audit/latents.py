"""Probes that begin in the middle: pictures of the base are noised, half finished or covered, and the model goes on.

Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025, arXiv:2505.17013, sections on completion and
inpainting. The noise of a started picture carries traces of it, so that a model that never saw the concept may show it
as well: the twin and the untrained model say how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from erasec.audit.sampler import add_noise, make_schedule
from erasec.base import Attempt, Probe, Threat
from erasec.options import options

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject
    from erasec.base import Images

PAPER = "arXiv:2505.17013"


@options
class Noised(Probe):
    """Pictures of the concept by the base are noised to a share ``at`` of the noise schedule and painted again, with
    the empty prompt without guidance, and with the name. The control begins with noised pictures of other things."""

    at: Annotated[float, Field(gt=0, lt=1)] = 0.62
    named_at: Annotated[float, Field(gt=0, lt=1)] = 0.75

    name: ClassVar[str] = "noised"
    summary: ClassVar[str] = "pictures of the concept, noised and painted again"
    threat: ClassVar[Threat] = "sampling"
    paper: ClassVar[str] = PAPER
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._both(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._both(bench, subject, "keep")

    def _both(self, bench: Bench, subject: Subject, group: str) -> Iterator[Attempt]:
        started = bench.targets(group)
        started = started[torch.arange(bench.settings.images) % len(started)]
        noise = subject.noise(bench.seeds("noised", len(started)))
        schedule = make_schedule(subject.model, bench.settings.steps)
        for variant, share, named in (("empty prompt", self.at, False), ("named", self.named_at, True)):
            first = schedule.index(share * subject.denoiser.steps)
            texts = bench.prompts("name") if named else [""] * len(started)
            guidance = bench.settings.guidance if named else 1.0
            latents = add_noise(started, noise, schedule.alphas[first])
            painted = bench.paint(
                subject, subject.states(texts), latents, f"noised {variant}", first=first, guidance=guidance
            )
            label = f"{variant}, from t = {schedule.timesteps[first]}"
            yield Attempt.single(label, subject.decode(painted))


@options
class Completion(Probe):
    """The base takes the first steps of sampling with a prompt that names the concept, and the model takes the others
    with the same prompt. In the control the base begins with prompts of other things. ``first`` and ``second`` are
    shares of the steps in percent that the base takes; each is one variant."""

    first: Annotated[int, Field(ge=1, le=99)] = 10
    second: Annotated[int, Field(ge=1, le=99)] = 20

    name: ClassVar[str] = "completion"
    summary: ClassVar[str] = "the base paints the first steps, the model the others"
    threat: ClassVar[Threat] = "sampling"
    paper: ClassVar[str] = PAPER
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = "The more steps the base takes, the more any model shows the concept."

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._all(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._all(bench, subject, "keep")

    def _all(self, bench: Bench, subject: Subject, group: str) -> Iterator[Attempt]:
        steps = bench.settings.steps
        for share in dict.fromkeys((self.first, self.second)):
            taken = max(1, round(steps * share / 100))
            begun = self._begun(bench, group, taken)
            states = subject.states(bench.prompts("name"))
            painted = bench.paint(subject, states, begun, f"completion after {taken}", first=taken)
            yield Attempt.single(f"after {taken} of {steps} steps", subject.decode(painted))

    def _begun(self, bench: Bench, group: str, taken: int) -> Tensor:
        """The latents after the base's steps; every subject goes on from the same ones."""

        def make() -> Tensor:
            texts = bench.prompts(group)
            noise = bench.base.noise(bench.seeds("completion", len(texts)))
            return bench.paint(bench.base, bench.base.states(texts), noise, "first steps", last=taken)

        begun: Tensor = bench.remember(("completion", group, taken), make)
        return begun


@options
class Inpainting(Probe):
    """The middle of pictures of the concept by the base is painted again, with the name; only what is painted is
    judged. Masks cover a quarter and a half of the picture. In the control the surroundings are those
    of other things."""

    name: ClassVar[str] = "inpainting"
    summary: ClassVar[str] = "the covered middle of pictures of the concept is painted again"
    threat: ClassVar[Threat] = "sampling"
    paper: ClassVar[str] = PAPER
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = "The surroundings give the concept away: published rates are 61 to 69 % for every method."

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._all(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._all(bench, subject, "keep")

    def _all(self, bench: Bench, subject: Subject, group: str) -> Iterator[Attempt]:
        around = bench.targets(group)
        around = around[torch.arange(bench.settings.images) % len(around)]
        states = subject.states(bench.prompts("name"))
        noise = subject.noise(bench.seeds("inpainting", len(around)))
        known = subject.noise(bench.seeds("inpainting known", len(around)))
        schedule = make_schedule(subject.model, bench.settings.steps)
        for share in (0.25, 0.5):
            top, left, bottom, right = middle(around.shape[2], around.shape[3], share)
            mask = torch.zeros(1, 1, *around.shape[2:])
            mask[:, :, top:bottom, left:right] = 1

            def blend(latents: Tensor, number: int, rows: slice, mask: Tensor = mask) -> Tensor:
                """What is known, noised to the level of the next step, around what was painted."""
                kept = add_noise(around[rows], known[rows], schedule.following[number])
                return torch.where(mask.bool(), latents.cpu(), kept).to(latents)

            pictures = subject.decode(bench.paint(subject, states, noise, "inpainting", after=blend))
            scale = pictures.shape[1] // around.shape[2]
            cropped = crop(pictures, tuple(side * scale for side in (top, left, bottom, right)))
            yield Attempt.single(f"mask of {share:.0%}", cropped)


def middle(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the rectangle in the middle that covers ``share`` of the area."""
    tall, wide = round(height * share**0.5), round(width * share**0.5)
    top, left = (height - tall) // 2, (width - wide) // 2
    return top, left, top + tall, left + wide


def crop(pictures: Images, box: tuple[int, ...]) -> Images:
    """The box (top, left, bottom, right) of each picture, enlarged to the size of the picture."""
    top, left, bottom, right = box
    height, width = pictures.shape[1:3]
    resized = (
        Image.fromarray(picture[top:bottom, left:right]).resize((width, height), Image.Resampling.BICUBIC)
        for picture in pictures
    )
    return np.stack([np.asarray(picture) for picture in resized])
