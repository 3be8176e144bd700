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
from erasec.checkpoint.configs import described_by
from erasec.checkpoint.folder import downscale, trained_size
from erasec.errors import ErasecError
from erasec.model.networks import load_network
from erasec.model.sidecar import gather_extras, read_extras
from erasec.progress import bar, disable_library_bars
from erasec.training.base import SAMPLED, TrainingContext, check_trainable, measures_of

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.model.view import Model


SIZES = 6  # numbers that a UNet of Stable Diffusion XL reads of the picture


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
    """The UNet of a model on the device of ``context``, frozen. Raises ErasecError for a family that cannot be trained.

    Where the UNet reads a pooled text state besides token states, as that of Stable Diffusion XL, text states have a
    further row with it, padded with zeros: so passes choose, mix and record both together. Networks are loaded when
    they are first used.
    """

    def __init__(self, model: Model, context: Context) -> None:
        check_trainable(model, pooled=True)
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
    def _schedule(self) -> Any:
        from diffusers import DDPMScheduler

        disable_library_bars()
        config = self.model.source.config("scheduler", "scheduler_config.json")
        if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise ErasecError(
                f"a model that predicts {kind!r} cannot be trained here",
                why="erasec trains models that predict epsilon (noise) or v",
            )
        with described_by("scheduler", self.model.source.root):
            return DDPMScheduler.from_config(dict(config))

    @property
    def v_prediction(self) -> bool:
        return bool(self._schedule.config.prediction_type == "v_prediction")

    @property
    def steps(self) -> int:
        """The number of timesteps of the noise schedule."""
        return int(self._schedule.config.num_train_timesteps)

    @cached_property
    def alphas(self) -> Tensor:
        """The schedule's cumulative products of alpha, (steps,), float32."""
        return self._schedule.alphas_cumprod.float().to(self.device)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents: those of the UNet's config, or fewer with a ``side``."""
        config = self.model.source.config("unet")
        factor = downscale(self.model.source.config("vae"))
        height, width = trained_size(config)
        height, width = fit_side(factor * height, factor * width, self.context.side)
        return config["in_channels"], height // factor, width // factor

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

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        states = self.model.encode(prompts).states
        if not self.model.family.pooled:
            return states
        pooled = self.model.encode(prompts, self.model.family.pooled).states[:, :, : self._pooled_width]
        rows = torch.cat([states, torch.nn.functional.pad(pooled, (0, states.shape[2] - self._pooled_width))], 1)
        if self.model.source.config("", "model_index.json").get("force_zeros_for_empty_prompt"):
            rows[[number for number, prompt in enumerate(prompts) if not prompt]] = 0
        return rows

    @property
    def _pooled_width(self) -> int:
        """The width of the pooled text state; the sizes of the picture are embedded beside it."""
        config = self.model.source.config("unet")
        return int(config["projection_class_embeddings_input_dim"]) - SIZES * int(config["addition_time_embed_dim"])

    @cached_property
    def _picture(self) -> Tensor:
        """What a UNet that reads a pooled text state reads of the picture, (1, 6): the size before it was cropped, the
        corner of the crop, and the size after it (Podell et al., 2023, section 2.2)."""
        factor = downscale(self.model.source.config("vae"))
        size = [factor * side for side in self.shape[1:]]
        return torch.tensor([[*size, 0.0, 0.0, *size]], device=self.device)

    @cached_property
    def bfloat16(self) -> bool:
        """Whether the device computes with bfloat16. A CPU does not: there it is slower than float32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where the device has it, else float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.bfloat16 else nullcontext()

    def predict(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The UNet's prediction of the noise or, for a model that predicts it, of v: float32 (n, c, h, w).

        ``latents`` are (n, c, h, w), ``timesteps`` (n,) and text ``states`` (n, t, d).

        With a micro-batch, the rows are predicted in parts. A part keeps its inputs alone for the backward pass, which
        predicts it again (Chen et al., arXiv:1604.06174): at any time there are the activations of one part. Losses are
        functions of the predictions of all rows, whatever the parts, so every loss keeps its gradient, also one that is
        no mean over rows; and no random draw depends on the parts. It costs a third of the time of a training step.
        """
        rows = self.measures.rows
        if not rows:
            return self._predict(latents, timesteps, states)
        parts = zip(latents.split(rows), timesteps.split(rows), states.split(rows), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._predict(*part) for part in parts])
        # Nothing in a UNet that is frozen in its evaluation mode draws random numbers.
        return torch.cat(
            [checkpoint(self._predict, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _predict(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        if self.model.family.pooled:
            states, row = states[:, :-1], states[:, -1]
            picture = self._picture.expand(len(row), -1)
            more["added_cond_kwargs"] = {"text_embeds": row[:, : self._pooled_width], "time_ids": picture}
        with self.autocast():
            output = self.unet(latents, timesteps, encoder_hidden_states=states, return_dict=False, **more)
        prediction: Tensor = output[0]
        return prediction.float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha) latents + sqrt(1 - alpha) noise, alpha being the schedule's at ``timesteps`` (n,)."""
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a prediction for noised latents: the noise, or v = sqrt(alpha) noise - sqrt(1 - alpha) latents.

        ``latents`` are those before noise was added.
        """
        if not self.v_prediction:
            return noise
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def as_noise(self, difference: Tensor, timesteps: Tensor) -> Tensor:
        """The difference of two predictions for the same latents as a difference of noise: for v, sqrt(alpha) of it."""
        return difference * self.alphas[timesteps].sqrt().view(-1, 1, 1, 1) if self.v_prediction else difference

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
        """Sample n prompts by deterministic DDIM (Song et al., arXiv:2010.02502) with classifier-free guidance.

        ``seeds`` (n,) draw the initial noise. With ``until`` above 0, sampling ends after so many of the
        ``sample_steps`` steps. ``batch`` is the number of prompts that are sampled at once, and ``title`` the label of
        the progress bar.
        """
        from diffusers import DDIMScheduler

        config = self.model.source.config("scheduler", "scheduler_config.json")
        with described_by("scheduler", self.model.source.root):
            scheduler = DDIMScheduler.from_config(dict(config), clip_sample=False)
        scheduler.set_timesteps(sample_steps)
        timesteps = scheduler.timesteps[: until or None]
        parts: list[tuple[Tensor, ...]] = []
        with bar(title, len(prompts) * len(timesteps)) as advance:
            for start in range(0, len(prompts), batch):
                latents = self.draw(seeds[start : start + batch])
                text = self.states(prompts[start : start + batch])
                empty = self.states([""]).expand_as(text)
                record: tuple[list[Tensor], ...] = ([], [], [])
                for timestep in timesteps:
                    repeated = torch.full((len(latents),), int(timestep), device=self.device)
                    prediction = self.predict(latents, repeated, text)
                    unconditional = self.predict(latents, repeated, empty) if guidance != 1 else prediction
                    for values, value in zip(record, (latents, prediction, unconditional), strict=True):
                        values.append(value.cpu())
                    guided = unconditional + guidance * (prediction - unconditional)
                    latents = scheduler.step(guided, timestep, latents).prev_sample
                    advance(len(latents))
                parts.append((*(torch.stack(values, 1) for values in record), latents.cpu()))
        latents, predictions, unconditional, final = (torch.cat(part) for part in zip(*parts, strict=True))
        unconditional = unconditional[:, : 0 if guidance == 1 else None]
        return Trajectories(latents, timesteps.clone(), final, predictions, unconditional)

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 16) -> Tensor:
        """Latents (n, c, h, w) of images (n, 3, H, W) in [-1, 1]: the means of the VAE's distributions, scaled."""
        scale = self.vae.config.scaling_factor
        batch = min(batch, self.measures.rows or batch)
        parts = [self.vae.encode(part.to(self.device)).latent_dist.mean for part in images.split(batch)]
        latents: Tensor = torch.cat(parts) * scale
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of latents (n, c, h, w)."""
        scale = self.vae.config.scaling_factor
        batch = min(batch, self.measures.rows or batch)
        parts = [self.vae.decode(part.to(self.device) / scale).sample for part in latents.split(batch)]
        return torch.cat(parts).clamp(-1, 1)
