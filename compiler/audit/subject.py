"""A subject of an audit: the audited model, its base, a twin, or an untrained denoiser."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from erasec.attention.pipeline import add_tokens, first_batch, generate
from erasec.attention.processors import call_state
from erasec.attention.sampling import Sampling
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError
from erasec.judging.picture_cache import identity
from erasec.ldm.single_file import SingleFile
from erasec.model.sidecar import gather_extras, read_extras
from erasec.progress import bar
from erasec.runtime.bundle import open_bundle
from erasec.runtime.schedulers import make_scheduler
from erasec.training.base import check_trainable
from erasec.training.denoiser import Denoiser

if TYPE_CHECKING:
    from erasec.base import Context, Images
    from erasec.model.sidecar import Extras
    from erasec.model.view import Model

EMPTY = ""


class Pictured(ABC):
    """What can paint pictures of prompts. ``digest`` changes with everything that decides them. ``only_pictures`` says
    why it can do nothing else; "" where it can."""

    role: str
    digest: str
    only_pictures: str = ""

    @cached_property
    def texts(self) -> dict[str, None]:
        """The texts that the subject has read since the bench last emptied it, each once, in their order."""
        return {}

    @abstractmethod
    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> Images:
        """Pictures (n, height, width, 3) of n prompts, each from its own seed."""

    def release(self) -> None:
        """Free the memory of the networks; they are loaded again on the next use."""
        return


class Runtime(Pictured):
    """A folder of ONNX, OpenVINO or engine files, run by its own runtime. It has no gradients."""

    only_pictures = "it needs the weights as torch tensors, and a runtime's folder has none: audit the hf folder"

    def __init__(self, role: str, folder: Path) -> None:
        self.role, self.folder = role, folder
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        lines = (f"{file.relative_to(folder).as_posix()} {file_digest(file)}" for file in files)
        self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> Images:
        self.texts.update(dict.fromkeys(prompts))
        bundle = open_bundle(self.folder)
        try:
            return bundle.generate(prompts, seeds, steps, guidance, scheduler=scheduler)
        finally:
            bundle.close()


class Painted(Pictured):
    """A model that its own pipeline paints with, of any family. Probes that need no more than pictures attack it."""

    def __init__(self, role: str, model: Model, context: Context) -> None:
        self.role, self.model, self.context = role, model, context
        self.digest = identity(model)
        self.only_pictures = (
            f"it works with token states alone, and attacks of this kind are not written for {model.family.title}"
        )

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> Images:
        if scheduler != "ddim":  # the bench's name for the sampler of the model itself
            raise ErasecError(
                f"the sampler {scheduler} is not tried on {self.model.family.title}",
                why="its pipeline paints with the scheduler of its folder",
                fix="leave out this probe for models of this family",
            )
        self.texts.update(dict.fromkeys(prompts))
        sampling = Sampling(steps, guidance, self.context.device, side=self.context.side)
        title = f"pictures of the {self.role}"
        return generate(self.folder, prompts, seeds, sampling, title, self.model.source.variant)

    @cached_property
    def folder(self) -> Path:
        """The folder that the pipeline reads. A single file is written as one, for as long as the process runs."""
        source = self.model.source
        if not isinstance(source, SingleFile):
            return source.root
        folder = process_scratch() / f"painted-{self.digest}"
        if not folder.exists():
            source.write(folder, {})
        return folder


def can_attack(model: Model) -> bool:
    """Whether a model can be a ``Subject``."""
    try:
        check_trainable(model, ("token states",))
    except ErasecError:
        return False
    return True


class Subject(Pictured):
    """A model as torch networks, with all that its folder carries besides weights. No tensor requires gradients.

    ``model`` may have edits. Raises ErasecError for a family whose denoiser cannot be run here.
    """

    def __init__(self, role: str, model: Model, context: Context) -> None:
        check_trainable(model, ("token states",))
        self.role, self.model, self.context = role, model, context
        self.device = torch.device(context.device)
        self._states: dict[str, Tensor] = {}

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        sha256 = hashlib.sha256(self.model.digest.encode())
        for name in ("erasec.safetensors", "scheduler/scheduler_config.json"):
            if (path := self.model.source.root / name).is_file():
                sha256.update(f"{name} {file_digest(path)}".encode())
        for edit in self.model.edits:  # a model with edits is one that a probe made of a subject
            sha256.update(repr((edit.by, edit.concepts, edit.base, sorted(edit.params.items()))).encode())
        return sha256.hexdigest()

    @cached_property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.model, self.context)

    @cached_property
    def extras(self) -> Extras:
        return gather_extras(self.model.edits, read_extras(self.model.source.root))

    @cached_property
    def text_encoder(self) -> tuple[Any, Any]:
        """The tokenizer and the text encoder, on the CPU, with the tokens that the folder carries."""
        tokenizer, encoder = self.model.text_encoder("text_encoder")
        # Another subject that shares the text encoder of this view may have added them already.
        if not self.extras.tokens.keys() <= tokenizer.get_vocab().keys():
            add_tokens(tokenizer, encoder, self.extras.tokens)
        return tokenizer, encoder.requires_grad_(False)

    @property
    def batch(self) -> int:
        """Pictures that are sampled at once."""
        return first_batch(self.denoiser.unet, self.context.device)

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) of prompts, float32 on the CPU. Each prompt is encoded once."""
        _ = self.text_encoder  # adds the folder's own tokens before the first prompt is read
        self.texts.update(dict.fromkeys(prompts))
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]
        if missing:
            self._states.update(zip(missing, self.model.encode(missing).states.cpu(), strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts])

    @property
    def negative(self) -> Tensor:
        """Text states (t, d) of the prompt without guidance: the folder's own negative prompt, or the empty one."""
        return self.states([self.extras.negative])[0]

    def predict(self, latents: Tensor, timestep: float | Tensor, states: Tensor) -> Tensor:
        """The prediction of the noise (n, c, h, w) without guidance. Gradients flow to ``latents`` and ``states``.

        ``timestep`` is one for all rows, or one for each (n,).
        """
        return self.predicted_noise(latents, timestep, states, 1.0)

    def predicted_noise(self, latents: Tensor, timestep: float | Tensor, states: Tensor, guidance: float) -> Tensor:
        """The prediction of the noise (n, c, h, w) with classifier-free guidance of scale ``guidance``; 1 is none."""
        output = self.output(latents, timestep, states, guidance)
        if not self.denoiser.v_prediction:
            return output
        alpha = self.denoiser.alphas[self._timesteps(timestep, len(latents)).long()].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * latents

    def output(self, latents: Tensor, timestep: float | Tensor, states: Tensor, guidance: float) -> Tensor:
        """What the network itself predicts, noise or v (n, c, h, w), with classifier-free guidance."""
        if (state := call_state(self.denoiser.unet)) is not None:
            state.guided = guidance != 1
        steps = self._timesteps(timestep, len(latents))
        if guidance == 1:
            return self.denoiser.predict(latents, steps, states)
        # One call for both halves, as pipelines make it: memories act on the second half alone.
        empty = self.negative.to(states).expand_as(states)
        both = self.denoiser.predict(torch.cat([latents] * 2), torch.cat([steps] * 2), torch.cat([empty, states]))
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _timesteps(self, timestep: float | Tensor, count: int) -> Tensor:
        if isinstance(timestep, Tensor):
            return timestep.to(self.device)
        return torch.full((count,), timestep, device=self.device)

    def pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, scheduler: str = "ddim"
    ) -> Images:
        config = dict(self.model.source.config("scheduler", "scheduler_config.json"))
        # Those of StableDiffusionPipeline.
        config |= {"steps_offset": 1, "clip_sample": False}
        parts = []
        with bar(f"pictures of the {self.role}", len(prompts)) as advance, torch.no_grad():
            for start in range(0, len(prompts), self.batch):
                rows = slice(start, start + self.batch)
                stepper = make_scheduler(config, steps, scheduler)
                latents = self.denoiser.draw(seeds[rows]).cpu().numpy() * np.float32(stepper.start)
                states = self.states(prompts[rows]).to(self.device)
                for number, timestep in enumerate(stepper.timesteps):
                    scaled = torch.from_numpy(stepper.scaled(number, latents)).to(self.device)
                    output = self.output(scaled, float(timestep), states, guidance)
                    latents = stepper.step(number, output.cpu().numpy(), latents)
                parts.append(self.decode(torch.from_numpy(latents)))
                advance(len(latents))
        return np.concatenate(parts)

    def decode(self, latents: Tensor) -> Images:
        """Pictures (n, height, width, 3) of latents (n, c, h, w)."""
        pixels = (self.denoiser.decode(latents, self.batch) / 2 + 0.5).permute(0, 2, 3, 1)
        images: Images = (pixels.nan_to_num() * 255).round().byte().cpu().numpy()
        return images

    def encode(self, images: Images) -> Tensor:
        """Latents (n, c, h, w) of pictures (n, height, width, 3), on the CPU."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.denoiser.encode(pixels, self.batch).cpu()

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Normal noise (n, c, h, w), each row from its own seed, on the CPU."""
        return self.denoiser.draw(seeds).cpu()

    def release(self) -> None:
        self.__dict__.pop("denoiser", None)
        self.__dict__.pop("text_encoder", None)
        self.model.release_text_encoders()


class Untrained(Subject):
    """The model with a denoiser of random weights, as its class initialises it."""

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        return hashlib.sha256(f"untrained {self.model.digest} {self.context.seed}".encode()).hexdigest()

    @cached_property
    def denoiser(self) -> Denoiser:
        denoiser = Denoiser(self.model, self.context)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.context.seed)
            for module in denoiser.unet.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        return denoiser
