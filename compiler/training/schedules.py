"""Schedules of noise and rectified flows behind one interface: what a denoiser predicts for noised latents, and when.

Timesteps are the numbers that the denoiser is called with: whole ones of a schedule of noise, and 1000 sigma of a flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from erasec.checkpoint.configs import described_by
from erasec.errors import ErasecError
from erasec.progress import disable_library_bars

if TYPE_CHECKING:
    from erasec.family import Family

Space = Literal["noise", "image"]


class Schedule(Protocol):
    """One of both. ``timesteps`` (n,) belong to latents (n, c, h, w); picture and noise are parts of noised latents."""

    @property
    def steps(self) -> int:
        """The number of timesteps that the denoiser was trained at."""

    @property
    def grid(self) -> Tensor:
        """These timesteps, (steps,), from the least noise to the most."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a prediction for noised latents; ``latents`` are those before noise was added."""

    def as_noise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        """The difference of two predictions for the same latents in the unit in which errors are compared between
        timesteps: as noise, or of a flow as the velocity itself, since as noise it would vanish where sigma is 1."""

    def error_scale(self, timesteps: Tensor, space: Space) -> Tensor:
        """The factor (n,) of a squared error of predictions that gives it in ``space``: as in ``as_noise``, or in the
        picture that follows from the prediction in one step."""

    def picture_ratio(self) -> Tensor:
        """The amplitude of the picture in noised latents relative to that of the noise, (steps,), as in ``grid``."""

    def sampler(self, sample_steps: int) -> Any:
        """A deterministic scheduler of diffusers, with its timesteps set for ``sample_steps`` steps."""


class NoiseSchedule:
    """A schedule of noise: latents are sqrt(alpha) picture + sqrt(1 - alpha) noise, with ``alphas`` (steps,) float32.

    Predictions are the noise or, with ``v_prediction``, v = sqrt(alpha) noise - sqrt(1 - alpha) picture. Raises
    ErasecError for a model that predicts something else.
    """

    def __init__(self, config: Mapping[str, Any], root: Path, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        disable_library_bars()
        self._config, self._root = dict(config), root
        if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise ErasecError(
                f"a model that predicts {kind!r} cannot be trained here",
                why="erasec trains models that predict epsilon (noise) or v",
            )
        with described_by("scheduler", root):
            scheduler = DDPMScheduler.from_config(dict(config))
        self.v_prediction = bool(scheduler.config.prediction_type == "v_prediction")
        self.steps = int(scheduler.config.num_train_timesteps)
        self.alphas: Tensor = scheduler.alphas_cumprod.float().to(device)
        self.grid = torch.arange(self.steps, device=device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not self.v_prediction:
            return noise
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def as_noise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        return difference * self.alphas[timesteps].sqrt().view(-1, 1, 1, 1) if self.v_prediction else difference

    def error_scale(self, timesteps: Tensor, space: Space) -> Tensor:
        alpha = self.alphas[timesteps]
        # Errors of noise e, image x and v are proportional: dv^2 = de^2 / alpha = dx^2 / (1 - alpha).
        scale = alpha if self.v_prediction else torch.ones_like(alpha)
        return scale * (1 - alpha) / alpha if space == "image" else scale

    def picture_ratio(self) -> Tensor:
        return (self.alphas / (1 - self.alphas)).sqrt()

    def sampler(self, sample_steps: int) -> Any:
        from diffusers import DDIMScheduler

        with described_by("scheduler", self._root):
            scheduler = DDIMScheduler.from_config(self._config, clip_sample=False)
        scheduler.set_timesteps(sample_steps)
        return scheduler


class FlowSchedule:
    """A rectified flow: latents are (1 - sigma) picture + sigma noise, and predictions velocities, noise - picture.

    ``patches`` is the number of patches of a picture, on which the schedule of some models depends. If ``even_sigmas``,
    sampling takes even steps of sigma from 1 to 1 / sample_steps before they are shifted, as FLUX's pipeline does.
    """

    def __init__(
        self, config: Mapping[str, Any], root: Path, device: torch.device, patches: int, even_sigmas: bool
    ) -> None:
        self._config, self._root, self._even_sigmas, self._device = dict(config), root, even_sigmas, device
        options = self._scheduler().config
        self.steps = int(options.num_train_timesteps)
        self._mu: float | None = None
        if options.use_dynamic_shifting:
            slope = (options.max_shift - options.base_shift) / (options.max_image_seq_len - options.base_image_seq_len)
            self._mu = options.base_shift + slope * (patches - options.base_image_seq_len)

    def _scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        disable_library_bars()
        with described_by("scheduler", self._root):
            return FlowMatchEulerDiscreteScheduler.from_config(self._config)

    @cached_property
    def grid(self) -> Tensor:
        scheduler = self._scheduler()
        sigmas: Tensor = scheduler.sigmas.flip(0)
        if self._mu is not None:
            sigmas = scheduler.time_shift(self._mu, 1.0, sigmas)
        return (sigmas * self.steps).float().to(self._device)

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / self.steps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def as_noise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        return difference

    def error_scale(self, timesteps: Tensor, space: Space) -> Tensor:
        sigma = self._sigma(timesteps)
        return sigma.square() if space == "image" else torch.ones_like(sigma)

    def picture_ratio(self) -> Tensor:
        sigma = self._sigma(self.grid)
        return (1 - sigma) / sigma

    def sampler(self, sample_steps: int) -> Any:
        scheduler = self._scheduler()
        more: dict[str, Any] = {} if self._mu is None else {"mu": self._mu}
        if self._even_sigmas:
            more["sigmas"] = torch.linspace(1, 1 / sample_steps, sample_steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sample_steps, **more)
        return scheduler


def make_schedule(
    family: Family, config: Mapping[str, Any], root: Path, device: torch.device, patches: int
) -> Schedule:
    """The schedule of a model of ``family`` from its scheduler_config.json, for pictures of ``patches`` patches.

    ``root`` is the model's folder, for errors. Raises ErasecError for a config that diffusers refuses.
    """
    if family.flow:
        return FlowSchedule(config, root, device, patches, family.even_sigmas)
    return NoiseSchedule(config, root, device)
