"""What learned passes share: the options of a training, what it is shown, and how it becomes an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from erasec.base import Pass
from erasec.closed_form.base import goals
from erasec.errors import ErasecError
from erasec.model.edit import Edit
from erasec.progress import bar
from erasec.training import loop as train
from erasec.training.denoiser import trained

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser, Student, Trajectories
    from erasec.training.loop import Run, Turn

# What the published "all but cross-attention" leaves out besides: the output head and the time embedding.
HEADS = ("conv_out.", "conv_norm_out.", "time_embedding.")
TOWARD = ("anchor", "nothing")
TEACH = 32  # pictures for which the teacher is asked at once


@dataclass(frozen=True)
class Learned(Pass):
    """A pass that trains some tensors. ``steps`` and, above 0, ``minutes`` are its budget; ``batch`` is the number of
    latents in each loss; ``rank`` above 0 trains low-rank changes of the matrices alone, in place of whole tensors."""

    steps: int = 200
    lr: float = 1e-4
    batch: int = 4
    rank: int = 0
    minutes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 1 or more")
        for name in ("rank", "minutes"):
            if getattr(self, name) < 0:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 0 or more")
        if not self.lr > 0:
            raise ErasecError(f"{self.name}: option lr is {self.lr}", why="it takes a number above 0")

    def work(self, model: Model, concept: Concept, context: Context) -> Path | None:
        """The file in which a training that is interrupted is kept, if the build keeps any."""
        if context.work is None:
            return None
        return context.work / f"{self.name}-{train.fingerprint(self, model, concept, context)[:16]}.safetensors"

    def fit(
        self, turns: Sequence[Turn], student: Student, model: Model, concept: Concept, context: Context, **more: Any
    ) -> Run:
        """``train.fit`` with this pass's options."""
        return train.fit(
            f"{self.name} {concept.name}", turns, steps=self.steps, minutes=self.minutes, seed=context.seed,
            work=self.work(model, concept, context), drift=student.drift, **more,
        )  # fmt: skip

    def edit(self, student: Student, run: Run, model: Model, concept: Concept, **more: Any) -> Edit:
        """The student's changes as an edit, with what the run measured."""
        stats = {**run.stats(), "parameters": float(sum(value.numel() for value in student.trained.values()))}
        return Edit(
            student.deltas(), self.name, concept.name, asdict(self), model.digest, stats, curves=run.curves, **more
        )


@dataclass(frozen=True)
class Bank:
    """Latents (m, c, h, w) on the way of many samples, their timesteps (m,), which prompt each came from (m,), and what
    the teacher said of each with its prompt and with none (m, c, h, w); on the CPU."""

    prompts: tuple[str, ...]
    latents: Tensor
    times: Tensor
    rows: Tensor
    said: Tensor
    free: Tensor

    def draw(self, count: int, chance: Generator) -> Tensor:
        """Indices (count,) of rows at random."""
        return torch.randint(len(self.latents), (count,), generator=chance)

    def texts(self, index: Tensor) -> list[str]:
        return [self.prompts[row] for row in self.rows[index].tolist()]


def spread(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` prompts: all of them before any comes again, in an order drawn from ``seed``."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[order[number % len(order)]] for number in range(count)]


def bank(
    denoiser: Denoiser, prompts: Sequence[str], seed: int, steps: int, guidance: float, part: slice = slice(None)
) -> Bank:
    """Sample every prompt once, and keep ``part`` of the steps; the teacher is the denoiser as it is."""
    paths = denoiser.sample(prompts, seeds(seed, len(prompts)), steps, guidance, until=max(0, part.stop or 0))
    if guidance == 1 and any(prompts):
        return asked(denoiser, prompts, paths, part)
    free = paths.said if guidance == 1 else paths.free
    return _along(prompts, paths, part, paths.said[:, part].flatten(0, 1), free[:, part].flatten(0, 1))


def seeds(seed: int, count: int) -> list[int]:
    """A seed for each of ``count`` samples: none with which a judge's panel begins, which would then look at pictures
    from the very noise that was trained on."""
    return [seed * 1_000_003 + 700_000 + number for number in range(count)]


@torch.no_grad()
def asked(denoiser: Denoiser, prompts: Sequence[str], paths: Trajectories, part: slice = slice(None)) -> Bank:
    """What the denoiser says along trajectories that may be another's, with each one's prompt and with none."""
    found = _along(prompts, paths, part, torch.empty(0), torch.empty(0))
    return replace(found, said=said(denoiser, found), free=said(denoiser, replace(found, prompts=("",) * len(prompts))))


@torch.no_grad()
def said(denoiser: Denoiser, found: Bank) -> Tensor:
    """What the denoiser says of each row of a bank with its prompt, (m, c, h, w) on the CPU."""
    parts = []
    with bar("teacher", len(found.latents)) as advance:
        for some in torch.arange(len(found.latents)).split(TEACH):
            latents, times = found.latents[some].to(denoiser.device), found.times[some].to(denoiser.device)
            parts.append(denoiser.predict(latents, times, denoiser.states(found.texts(some))).cpu())
            advance(len(some))
    return torch.cat(parts)


def away(denoiser: Denoiser, concept: Concept, found: Bank, negative: float, toward: str) -> Tensor:
    """Where ESD's Eq. 8 leads each row of a bank of the concept's prompts, (m, c, h, w) on the CPU.

    It is what the teacher says without a prompt, and ``negative`` times the way from what it says with it, again: so
    ``toward`` "nothing". With "anchor" the concept's goal takes its place in the prompt, so that what else the prompt
    asks for, such as a colour, stays.
    """
    base = found.free
    if toward == "anchor":
        becomes = [prompt.text for prompt in goals(concept, concept.phrases)]
        goal = dict(zip(texts(concept, concept.phrases), becomes, strict=True))
        base = said(denoiser, replace(found, prompts=tuple(goal[prompt] for prompt in found.prompts)))
    return base - negative * (found.said - base)


def _along(prompts: Sequence[str], paths: Trajectories, part: slice, said: Tensor, free: Tensor) -> Bank:
    times = paths.times[part]
    rows = torch.arange(len(prompts)).repeat_interleave(len(times))
    latents = paths.latents[:, part].flatten(0, 1)
    return Bank(tuple(prompts), latents, times.repeat(len(prompts)), rows, said, free)


def texts(concept: Concept, phrases: Sequence[str]) -> list[str]:
    """The phrases in every template of the concept."""
    return [prompt.text for prompt in concept.prompts(phrases)]


def kept(denoiser: Denoiser, found: Bank, batch: int, noise: bool = False) -> Callable[[Generator], Tensor]:
    """A loss that holds the student to what the teacher said of a bank, with its prompts and for a third with none.

    It is a mean square of what the network predicts; with ``noise``, of predicted noise where that is v, too.
    """

    def loss(chance: Generator) -> Tensor:
        index = found.draw(batch, chance)
        bare = torch.rand(batch, generator=chance) < 1 / 3
        prompts = ["" if none else text for none, text in zip(bare.tolist(), found.texts(index), strict=True)]
        wanted = torch.where(bare.view(-1, 1, 1, 1), found.free[index], found.said[index])
        device = denoiser.device
        times = found.times[index].to(device)
        off = denoiser.predict(found.latents[index].to(device), times, denoiser.states(prompts)) - wanted.to(device)
        return (denoiser.as_noise(off, times) if noise else off).square().mean()

    return loss


def trainable(model: Model, wanted: Callable[[Site], bool], rank: int = 0) -> tuple[Site, ...]:
    """The parameters of the denoiser that are ``wanted``; with a ``rank`` the matrices among them.

    Raises ErasecError for a family that is not trained here.
    """
    trained(model)
    return tuple(
        site for site in model.parameters
        if site.component == model.family.denoiser and wanted(site) and (not rank or len(site.shape) == 2)
    )  # fmt: skip


def modules(denoiser: Denoiser) -> Mapping[str, Any]:
    """The networks that sites of the denoiser lie in."""
    return {denoiser.model.family.denoiser: denoiser.unet}
