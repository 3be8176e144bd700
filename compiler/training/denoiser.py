"""A model's UNet to run and to train, with earlier edits merged in, its noise schedule, text states and trajectories.

Teacher and student are one network: ``Student`` keeps a copy of the tensors that a pass trains, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from erasec.attention.processors import attach
from erasec.attention.sampling import LARGE, fit_side
from erasec.checkpoint.folder import PATCH, downscale, pooled_width, trained_size
from erasec.family import FAMILIES
from erasec.model.networks import load_network
from erasec.model.sidecar import gather_extras, read_extras
from erasec.progress import bar
from erasec.training.base import SAMPLED, TrainingContext, check_trainable, measures_of
from erasec.training.calls import CALLS
from erasec.training.schedules import NoiseSchedule, Schedule, make_schedule

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.model.text_encoders import TextEncoders
    from erasec.model.view import Model


@dataclass(frozen=True)
class Trajectories:
    """The record of sampling n prompts, float32 on the CPU.

    ``latents`` (n, steps, c, h, w) are those before each step, ``timesteps`` (steps,) those of the network's calls, and
    ``final`` (n, c, h, w) the latents in the end. ``predictions`` with the prompt and ``unconditional`` ones, with the
    empty prompt, have the shape of ``latents``; without guidance ``unconditional`` has no steps.
    """

    latents: Tensor
    timesteps: Tensor
    final: Tensor
    predictions: Tensor
    unconditional: Tensor


class Denoiser:
    """The denoiser of a model on the device of ``context``, frozen: a UNet, or a transformer with joint attention.

    Where it reads a pooled text state besides token states, text states have a further row with it, padded with zeros:
    so passes choose, mix and record both together. What it predicts for noised latents, and at which timesteps, is that
    of its ``schedule``. Networks are loaded when they are first used. Raises ErasecError for a family that cannot be
    trained.

    Where guidance is distilled, a network may read its scale (``embeds_guidance``). Such a prediction is guided
    already, and the one for the empty prompt is not the unconditional one.
    """

    def __init__(self, model: Model, context: Context) -> None:
        check_trainable(model)
        self.model, self.context = model, context
        self.device = torch.device(context.device)
        self.measures = measures_of(context)
        self._states: dict[str, Tensor] = {}

    @cached_property
    def unet(self) -> Any:
        unet = load_network(self.model, self.model.family.denoiser, self.model.family.denoiser_class).to(self.device)
        extras = gather_extras(self.model.edits, read_extras(self.model.source.root))
        attach(unet, extras.memories, self.steps)
        if self.bfloat16:  # enough for frozen tensors; Student holds those that it trains in float32
            unet = unet.to(torch.bfloat16)
        # Without a limit of memory, only large models compute activations again: for small ones that would be slower.
        large = sum(weight.numel() for weight in unet.parameters()) > LARGE
        limited = isinstance(self.context, TrainingContext) and self.context.measures is not None
        if self.measures.checkpointing if limited else large:
            unet.enable_gradient_checkpointing()
        return unet

    @cached_property
    def vae(self) -> Any:
        return load_network(self.model, "vae", "AutoencoderKL").to(self.device)

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of noise, or the rectified flow."""
        source = self.model.source
        config = source.config("scheduler", "scheduler_config.json")
        _, height, width = self.shape
        patches = height * width // PATCH**2
        return make_schedule(self.model.family, config, source.root, self.device, patches)

    @property
    def v_prediction(self) -> bool:
        """Whether a model with a schedule of noise predicts v."""
        return self._noise_schedule.v_prediction

    @property
    def steps(self) -> int:
        """The number of timesteps that the model was trained at."""
        return self.schedule.steps

    @property
    def alphas(self) -> Tensor:
        """The cumulative products of alpha of a schedule of noise, (steps,), float32."""
        return self._noise_schedule.alphas

    @property
    def _noise_schedule(self) -> NoiseSchedule:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"{self.model.name} follows a rectified flow")
        return self.schedule

    @cached_property
    def embeds_guidance(self) -> bool:
        """Whether the network reads the scale of its distilled guidance."""
        return bool(self.model.source.config(self.model.family.denoiser).get("guidance_embeds"))

    def guidances(self, guidance: float) -> tuple[float, ...]:
        """The scales at which a network that reads one is trained: 1, at which the scale is not learned a second time,
        and ``guidance``, at which pictures are made. None for other networks."""
        return tuple(dict.fromkeys((1.0, guidance))) if self.embeds_guidance else ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents: those of the network's config, or fewer with a ``side``."""
        config = self.model.source.config(self.model.family.denoiser)
        factor = downscale(self.model.source.config("vae"))
        height, width = trained_size(config)
        height, width = fit_side(factor * height, factor * width, self.context.side)
        return config["in_channels"] // self.model.family.packing, height // factor, width // factor

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.shape[1] * downscale(self.model.source.config("vae")))

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) of prompts for the UNet, float32 on the device. Each prompt is encoded once.

        Those of the empty prompt are zeros where the pipeline of the model makes them zeros.
        """
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]:
            self._states.update(zip(missing, self._encode(missing), strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts]).to(self.device)

    def token_states(self, prompts: Sequence[str]) -> Tensor:
        """The rows of ``states`` that attention reads: without that of a pooled text state."""
        return self.states(prompts)[:, : -1 if self.model.family.pooled else None]

    def encode_prompts(self, prompts: Sequence[str], encoders: TextEncoders) -> Tensor:
        """What ``states`` returns, by other text encoders, whose parameters get gradients through it."""
        return self._encode(prompts, encoders).to(self.device)

    def _encode(self, prompts: Sequence[str], encoders: TextEncoders | None = None) -> Tensor:
        states = self.model.encode(prompts, encoders=encoders).states
        if not self.model.family.pooled:
            return states
        # In place of a text encoder that a folder lacks, pipelines read zeros.
        lacking = FAMILIES[self.model.family.name].streams[0].parts[len(self.model.family.streams[0].parts) :]
        states = torch.nn.functional.pad(states, (0, 0, 0, sum(part.length for part in lacking)))
        pooled = self.model.encode(prompts, self.model.family.pooled, encoders).states[:, :, : self._pooled_width]
        rows = torch.cat([states, torch.nn.functional.pad(pooled, (0, states.shape[2] - self._pooled_width))], 1)
        index = self.model.source.config("", "model_index.json")
        if not self.model.family.flow and index.get("force_zeros_for_empty_prompt", True):
            rows[[number for number, prompt in enumerate(prompts) if not prompt]] = 0
        return rows

    @cached_property
    def _pooled_width(self) -> int:
        return pooled_width(self.model.source.config(self.model.family.denoiser))

    @cached_property
    def bfloat16(self) -> bool:
        """Whether the device computes with bfloat16. A CPU does not: there it is slower than float32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where the device has it, else float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.bfloat16 else nullcontext()

    def predict(self, latents: Tensor, timesteps: Tensor, states: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The prediction of the noise, of v or of the velocity: float32 (n, c, h, w).

        ``latents`` are (n, c, h, w), ``timesteps`` (n,) and text ``states`` (n, t, d). ``guidance`` (n,) is for a
        network that reads it, by default 1: there the prediction is the plain one.

        With a micro-batch, the rows are predicted in parts. A part keeps its inputs alone for the backward pass, which
        predicts it again (Chen et al., arXiv:1604.06174): at any time there are the activations of one part. Losses are
        functions of the predictions of all rows, whatever the parts, so every loss keeps its gradient, also one that is
        no mean over rows; and no random draw depends on the parts. It costs a third of the time of a training step.
        """
        if self.embeds_guidance:
            scale = torch.ones(len(latents)) if guidance is None else guidance.float()
            guidance = scale.to(latents.device)
        else:
            guidance = None
        rows = self.measures.rows
        if not rows:
            return self._predict(latents, timesteps, states, guidance)
        count = -(-len(latents) // rows)
        guidances = [None] * count if guidance is None else guidance.split(rows)
        parts = zip(latents.split(rows), timesteps.split(rows), states.split(rows), guidances, strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._predict(*part) for part in parts])
        # Nothing in a denoiser that is frozen in its evaluation mode draws random numbers.
        return torch.cat(
            [checkpoint(self._predict, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _predict(self, latents: Tensor, timesteps: Tensor, states: Tensor, guidance: Tensor | None) -> Tensor:
        pooled = None
        if self.model.family.pooled:
            states, pooled = states[:, :-1], states[:, -1, : self._pooled_width]
        with self.autocast():
            call = CALLS[self.model.family.denoiser_class]
            prediction = call(self.unet, latents, timesteps, states, pooled, guidance)
        return prediction.float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents: ``Schedule.add_noise``."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a prediction for noised latents: ``Schedule.target``."""
        return self.schedule.target(latents, noise, timesteps)

    def as_noise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        """A difference of two predictions that can be compared between timesteps: ``Schedule.as_noise``."""
        return self.schedule.as_noise(difference, timesteps)

    def noisy_steps(self, sample_steps: int, least: float) -> slice:
        """The steps of a trajectory whose timestep is at least the fraction ``least`` of all (sigma, of a flow); the
        first one always."""
        if not least:
            return slice(None)
        timesteps = self.schedule.sampler(sample_steps).timesteps
        return slice(0, max(1, int((timesteps >= least * self.steps).sum())))

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Normal noise (n, c, h, w), each row drawn from its own seed on the CPU, so that all devices get the same."""
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sample_steps: int,
        guidance: float,
        batch: int = SAMPLED,
        title: str = "trajectories",
        until: int = 0,
    ) -> Trajectories:
        """Sample n prompts by deterministic DDIM (Song et al., arXiv:2010.02502), or by Euler steps along a rectified
        flow, with classifier-free guidance or, where guidance is distilled, with that of the network.

        ``seeds`` (n,) draw the initial noise. With ``until`` above 0, sampling ends after so many of the
        ``sample_steps`` steps. ``batch`` is the number of prompts that are sampled at once, and ``title`` the label of
        the progress bar.
        """
        timesteps = self.schedule.sampler(sample_steps).timesteps[: until or None]
        classifier_free = guidance != 1 and not self.model.family.distilled
        parts: list[tuple[Tensor, ...]] = []
        with bar(title, len(prompts) * len(timesteps)) as advance:
            for start in range(0, len(prompts), batch):
                scheduler = self.schedule.sampler(sample_steps)  # those of flows count their steps
                latents = self.draw(seeds[start : start + batch])
                text = self.states(prompts[start : start + batch])
                empty = self.states([""]).expand_as(text)
                scales = torch.full((len(latents),), guidance)
                record: tuple[list[Tensor], ...] = ([], [], [])
                for timestep in timesteps:
                    repeated = timestep.to(self.device).expand(len(latents))
                    prediction = self.predict(latents, repeated, text, scales)
                    unconditional = self.predict(latents, repeated, empty) if classifier_free else prediction
                    for values, value in zip(record, (latents, prediction, unconditional), strict=True):
                        values.append(value.cpu())
                    guided = prediction
                    if classifier_free:
                        guided = unconditional + guidance * (prediction - unconditional)
                    latents = scheduler.step(guided, timestep, latents).prev_sample
                    advance(len(latents))
                parts.append((*(torch.stack(values, 1) for values in record), latents.cpu()))
        latents, predictions, unconditional, final = (torch.cat(part) for part in zip(*parts, strict=True))
        unconditional = unconditional[:, : None if classifier_free else 0]
        return Trajectories(latents, timesteps.clone(), final, predictions, unconditional)

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 16) -> Tensor:
        """Latents (n, c, h, w) of images (n, 3, H, W) in [-1, 1]: the means of the VAE's distributions, scaled."""
        scale = self.vae.config.scaling_factor
        batch = min(batch, self.measures.rows or batch)
        parts = [self.vae.encode(part.to(self.device)).latent_dist.mean for part in images.split(batch)]
        latents: Tensor = (torch.cat(parts) - self._shift) * scale
        return latents

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of latents (n, c, h, w)."""
        scale = self.vae.config.scaling_factor
        batch = min(batch, self.measures.rows or batch)
        parts = [self.vae.decode(part.to(self.device) / scale + self._shift).sample for part in latents.split(batch)]
        return torch.cat(parts).clamp(-1, 1)
