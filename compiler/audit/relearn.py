"""Training after release: on pictures without the concept, on a few of the concept, of another style, and a merge.

An edit that only hides a concept may give way to a fine-tuning that is not about it, and be taught again from a few
pictures faster than a model that never saw the concept: the twin says how much is teaching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from erasec.audit.changed import Change, Changed, ChangedWeights, by_name
from erasec.audit.inversion import optimise
from erasec.base import Attempt
from erasec.errors import ErasecError
from erasec.options import options
from erasec.training.base import networks, trainable
from erasec.training.denoiser import Denoiser
from erasec.training.student import Student

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject
    from erasec.base import Images
    from erasec.family import Site

LESSONS = 64  # pictures without the concept
GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of BT.601
# Latents (n, c, h, w) of pictures on the CPU, and their n prompts.
Lessons = tuple[Tensor, list[str]]


def lessons(bench: Bench, group: str, count: int) -> Lessons:
    """``count`` pictures by the base with their prompts, or fewer: of the concept for the group "name", of other things
    for "keep". Those in which the selector sees something else are left out.

    Raises ErasecError where none is left.
    """

    def make() -> Lessons:
        drawn = 2 * count if group == "name" else count
        texts = bench.prompts(group, drawn)
        latents = bench.base.noise(bench.seeds(f"lessons {group}", drawn))
        made = bench.paint(bench.base, bench.base.states(texts), latents, "pictures to learn from")
        rows = list(range(drawn))
        if bench.selector is not None:
            seen = bench.selector.sees(bench.base.decode(made), [bench.selected_label] * drawn)
            rows = [row for row in rows if bool(seen[row]) == (group == "name")]
        if not rows:
            raise ErasecError(
                f"none of {drawn} pictures by the base can be learned from",
                why=f"the judge does not see in them what the group {group} asks for",
                fix="choose a concept that the base knows, or another judge: --judge NAME",
            )
        rows = rows[:count]
        return made[rows], [texts[row] for row in rows]

    pairs: Lessons = bench.remember(("lessons", group, count), make)
    bench.make_room()  # the trainings that follow hold a network of their own, with gradients and moments
    return pairs


def tuned(
    subject: Subject,
    pairs: Lessons,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    title: str,
    selects: Callable[[Site], bool] = lambda site: True,
    rank: int = 0,
) -> tuple[Changed, dict[str, float]]:
    """The subject after a fine-tuning of a copy of its denoiser, and the measurements of the training.

    The loss is the mean squared error of the network's own prediction, of the noise or of v, for ``batch`` noised
    pictures with their prompts. It is minimised by AdamW in ``steps`` steps. ``selects`` chooses tensors; a ``rank``
    above 0 trains low-rank changes of the matrices among them and merges these. The subject keeps its weights.
    """
    denoiser = Denoiser(subject.model, subject.context)
    student = Student(networks(denoiser), trainable(subject.model, selects, rank), rank, seed)
    changed = Changed(subject, f"{title} {steps} {lr} {batch} {rank}", denoiser=denoiser)
    latents, prompts = pairs
    states = subject.states(prompts)

    def loss(rng: Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=rng)
        # One timestep in each of ``batch`` equal parts of the schedule.
        parts = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        timesteps = (parts * denoiser.steps).long().to(denoiser.device)
        clean = latents[chosen].to(denoiser.device)
        noise = torch.randn(clean.shape, generator=rng).to(denoiser.device)
        noisy = denoiser.add_noise(clean, noise, timesteps)
        prediction = changed.output(noisy, timesteps, states[chosen].to(denoiser.device), 1.0)
        return (prediction - denoiser.target(clean, noise, timesteps)).square().mean()

    parameters = list(student.parameters.values())
    first, last = optimise(parameters, loss, steps, lr, seed, f"{title}, {subject.role}")
    measured = {"loss_first": first, "loss_last": last, "drift": student.drift()}
    merge_factors(denoiser.unet)
    return changed, measured


def merge_factors(network: nn.Module) -> None:
    """Replace parametrized tensors by their values, in place."""
    for module in network.modules():
        for name in list(getattr(module, "parametrizations", {})):
            nn.utils.parametrize.remove_parametrizations(module, name)
            getattr(module, name).requires_grad_(False)


def grayed(images: Images) -> Images:
    """Pictures (n, height, width, 3) in shades of gray."""
    luma = (images.astype(np.float32) @ GRAY).round().astype(np.uint8)
    return np.repeat(luma[..., None], 3, -1)


@options
class Finetune(ChangedWeights):
    """The denoiser is fine-tuned for ``first`` and for ``second`` steps on pictures of other things by the base, as
    someone would who only wants the model to draw these better; then prompts name the concept."""

    first: Annotated[int, Field(ge=1)] = 50
    second: Annotated[int, Field(ge=1)] = 200
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "fine-tuning on pictures without the concept"
    needs_base: ClassVar[bool] = True

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        pairs = lessons(bench, "keep", LESSONS)
        for steps in dict.fromkeys((self.first, self.second)):
            changed, measured = tuned(subject, pairs, steps, self.lr, self.batch, bench.settings.seed, self.name)
            yield Change(f"{steps} steps", changed, measured)
            del changed  # before the next one is trained


@options
class Relearn(ChangedWeights):
    """The denoiser is fine-tuned for ``first`` and for ``second`` steps on ``pictures`` of the concept by the base;
    then prompts name it. In the control the pictures are of other things.

    A model that never saw the concept learns it as well. What counts is that the edited model needs fewer steps.
    """

    first: Annotated[int, Field(ge=1)] = 10
    second: Annotated[int, Field(ge=1)] = 30
    pictures: Annotated[int, Field(ge=1)] = 8
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1.5e-4

    name: ClassVar[str] = "relearn"
    summary: ClassVar[str] = "fine-tuning on a few pictures of the concept"
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = "With enough steps it teaches any model; rates above the twin's are what was left."

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        yield from self._tuned(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        for change in self._tuned(bench, subject, "keep"):
            yield Attempt.single(change.variant, by_name(bench, change.subject, self.name))

    def _tuned(self, bench: Bench, subject: Subject, group: str) -> Iterator[Change]:
        pairs = lessons(bench, group, self.pictures)
        for steps in dict.fromkeys((self.first, self.second)):
            changed, measured = tuned(subject, pairs, steps, self.lr, self.batch, bench.settings.seed, self.name)
            yield Change(f"{steps} steps", changed, measured)
            del changed


@options
class Lora(ChangedWeights):
    """A LoRA of another style, pictures of other things in shades of gray, is trained on the attention of the model and
    merged; then prompts name the concept.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    steps: Annotated[int, Field(ge=1)] = 100
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-3

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a LoRA of another style, merged"
    paper: ClassVar[str] = "arXiv:2106.09685"
    needs_base: ClassVar[bool] = True

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        latents, prompts = lessons(bench, "keep", LESSONS)
        style = bench.remember(("gray", LESSONS), lambda: bench.base.encode(grayed(bench.base.decode(latents))))
        changed, measured = tuned(
            subject,
            (style, prompts),
            self.steps,
            self.lr,
            self.batch,
            bench.settings.seed,
            self.name,
            lambda site: site.attn in ("cross", "self"),
            self.rank,
        )
        yield Change(f"rank {self.rank}, {self.steps} steps", changed, measured)


@options
class Merge(ChangedWeights):
    """The mean of the denoiser's weights and those of another model: the base after ``steps`` steps of fine-tuning on
    pictures of other things. Half of the edit is left, so that the other half must do."""

    steps: Annotated[int, Field(ge=1)] = 50
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "a merge of equal parts with another fine-tuned model"
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = (
        "The other model knows the concept: the rates say whether it comes through, not that the edit has failed."
    )

    def changes(self, bench: Bench, subject: Subject) -> Iterator[Change]:
        def partner() -> dict[str, Tensor]:
            pairs = lessons(bench, "keep", LESSONS)
            other, _ = tuned(bench.base, pairs, self.steps, self.lr, self.batch, bench.settings.seed, self.name)
            return {key: value.cpu() for key, value in other.denoiser.unet.named_parameters()}

        other = bench.remember(("merge", self), partner)
        yield Change("half and half", mean_of(subject, other))


def mean_of(subject: Subject, other: dict[str, Tensor]) -> Changed:
    """The subject with the mean of its denoiser's parameters and those of ``other``, by name. Raises ErasecError where
    the two have other shapes."""
    denoiser = Denoiser(subject.model, subject.context)
    own = dict(denoiser.unet.named_parameters())
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in other.items()}:
        raise ErasecError(
            f"the weights of the {subject.role} cannot be merged with those of the base",
            why="their tensors have other names or shapes",
            fix="name the base of this very model: --base MODEL",
        )
    with torch.no_grad():
        for key, value in own.items():
            value.lerp_(other[key].to(value), 0.5)
    return Changed(subject, "merge", denoiser=denoiser)
