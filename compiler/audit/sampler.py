"""DDIM with everything that a probe changes: its noise, its first step, its latents, and its predictions.

Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502, equations 12 and 16; the scale of the
noise is that of Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025, arXiv:2505.17013.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from erasec.checkpoint.configs import described_by

if TYPE_CHECKING:
    from erasec.audit.subject import Subject
    from erasec.model.view import Model

# prediction of the noise (n, c, h, w), latents before the step, index of the step -> another prediction of the noise
Nudge = Callable[[Tensor, Tensor, int], Tensor]
# latents after a step, index of the step, the rows of the whole that they are -> other latents
After = Callable[[Tensor, int, slice], Tensor]


@dataclass(frozen=True)
class Schedule:
    """The steps of DDIM: ``timesteps`` of the network's calls, and the cumulative product of alpha at each of them and
    at the one that follows it."""

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    following: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def index(self, timestep: float) -> int:
        """The first step whose timestep is at most ``timestep``; the last one if there is none."""
        return next((number for number, step in enumerate(self.timesteps) if step <= timestep), len(self) - 1)


def make_schedule(model: Model, steps: int) -> Schedule:
    """The steps that diffusers' DDIMScheduler takes with the scheduler config of the model."""
    from diffusers import DDIMScheduler

    config = dict(model.source.config("scheduler", "scheduler_config.json"))
    with described_by("scheduler", model.source.root):
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(steps)
    stride = scheduler.config.num_train_timesteps // steps
    timesteps = tuple(int(step) for step in scheduler.timesteps)
    products, last = scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod)
    following = tuple(float(products[step - stride]) if step >= stride else last for step in timesteps)
    return Schedule(timesteps, tuple(float(products[step]) for step in timesteps), following)


def ddim_step(
    latents: Tensor, noise: Tensor, alpha: float, following: float, eta: float = 0.0, extra: Tensor | None = None
) -> Tensor:
    """The latents after one step, from the predicted ``noise`` and, with ``eta`` above 0, random noise ``extra``.

    With sigma the standard deviation that DDPM's ancestral sampling has for this step, the direction to x_t is scaled
    by sqrt(|1 - following - (eta sigma)^2|); the absolute value matters only for an ``eta`` above 1.
    """
    clean: Tensor = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    sigma = ((1 - following) / (1 - alpha) * (1 - alpha / following)) ** 0.5
    moved: Tensor = following**0.5 * clean + abs(1 - following - (eta * sigma) ** 2) ** 0.5 * noise
    return moved if extra is None else moved + extra.mul(eta * sigma)


@torch.no_grad()
def sample(
    subject: Subject,
    states: Tensor,
    latents: Tensor,
    steps: int,
    guidance: float,
    *,
    first: int = 0,
    last: int | None = None,
    eta: float = 0.0,
    noise_scale: float = 1.0,
    seeds: Sequence[int] = (),
    nudge: Nudge | None = None,
    after: After | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """The latents (n, c, h, w) that DDIM makes of ``latents`` with the text ``states`` (n, t, d), float32 on the CPU.

    Of ``steps`` steps those from index ``first`` up to ``last`` are taken. ``eta`` and ``noise_scale`` set the noise of
    each step, which is drawn from the ``seeds`` (n,). ``nudge`` changes the predictions of the noise, ``after`` the
    latents after each step. ``advance`` is called with the number of rows after each step of a batch.
    """
    schedule = make_schedule(subject.model, steps)
    parts = []
    for start in range(0, len(latents), subject.batch):
        rows = slice(start, start + subject.batch)
        x, text = latents[rows].to(subject.device), states[rows].to(subject.device)
        rngs = [Generator().manual_seed(seed) for seed in seeds[rows]]
        for number in range(first, len(schedule) if last is None else last):
            alpha, following = schedule.alphas[number], schedule.following[number]
            noise = subject.predicted_noise(x, schedule.timesteps[number], text, guidance)
            if nudge is not None:
                noise = nudge(noise, x, number)
            extra = None
            if eta:
                extra = noise_scale * torch.stack([torch.randn(x.shape[1:], generator=rng) for rng in rngs]).to(x)
            x = ddim_step(x, noise, alpha, following, eta, extra)
            if after is not None:
                x = after(x, number, rows)
            advance(len(x))
        parts.append(x.cpu())
    return torch.cat(parts)


def add_noise(latents: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """sqrt(alpha) latents + sqrt(1 - alpha) noise."""
    noisy: Tensor = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
    return noisy
