"""A UNet ready to run and to be trained: its weights with earlier edits, the noise schedule, text states, trajectories.

Teacher and student are one network: ``Student`` keeps a copy of the tensors that a pass trains, and nothing else twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erasec.attention.processors import attach
from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.ldm.tensor_names import canonical
from erasec.model import sidecar as extras
from erasec.model.edit import Delta, Dense, LowRank
from erasec.progress import bar, hush

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model

FAMILIES = ("sd1", "sd2")
LARGE = 200_000_000  # parameters from which activations are recomputed in the backward pass instead of kept


def loaded(model: Model, component: str, kind: str) -> Any:
    """A diffusers network in float32 from the checkpoint's config and tensors, with the model's edits merged in."""
    import diffusers

    hush()
    network = getattr(diffusers, kind)
    with torch.device("meta"):
        module = network.from_config(model.source.config(component))
    # Old folders name the attention of their VAE otherwise.
    entries = {canonical(component, key): entry for key, entry in model.entries(component).items()}
    changed = model.merged().get(component, {})
    wanted = module.state_dict().keys()
    if missing := sorted(wanted - entries.keys()):
        raise ErasecError(
            f"{component} has no tensor {missing[0]}", where=str(model.source.root),
            why=f"{len(missing)} of {len(wanted)} that its config asks for are missing",
        )  # fmt: skip
    state = {key: (changed[key]() if key in changed else read_tensor(entries[key])).float() for key in wanted}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def trained(model: Model) -> None:
    """Raise ErasecError for a family whose denoiser is not run here."""
    if model.family.name not in FAMILIES:
        raise ErasecError(
            f"a model of the family {model.family.name} cannot be trained here",
            why=f"learned passes run the denoisers of {' and '.join(FAMILIES)}",
            fix="choose a closed-form pass: erasec list passes",
        )


@dataclass(frozen=True)
class Trajectories:
    """What sampling went through: latents (n, steps, c, h, w) before each step, the timesteps (steps,) at which the
    network saw them, and the latents (n, c, h, w) after the last step; float32 on the CPU. ``said`` is what the network
    predicted there with the prompt and ``free`` with none, shaped as latents; ``free`` has no steps without guidance.
    """

    latents: Tensor
    times: Tensor
    final: Tensor
    said: Tensor
    free: Tensor


class Denoiser:
    """One model's UNet, on a device, frozen. Raises ErasecError for a family without such a UNet."""

    def __init__(self, model: Model, context: Context) -> None:
        trained(model)
        self.model, self.context = model, context
        self.device = torch.device(context.device)
        self._states: dict[str, Tensor] = {}

    @cached_property
    def unet(self) -> Any:
        unet = loaded(self.model, "unet", "UNet2DConditionModel").to(self.device)
        carried = extras.gathered(self.model.edits, extras.read(self.model.source.root))
        attach(unet, carried.memories, self.steps)
        if self.device.type == "cuda":  # frozen tensors need no more; what is trained is held in float32 by Student
            unet = unet.to(torch.bfloat16)
        if sum(weight.numel() for weight in unet.parameters()) > LARGE:
            unet.enable_gradient_checkpointing()
        return unet

    @cached_property
    def vae(self) -> Any:
        return loaded(self.model, "vae", "AutoencoderKL").to(self.device)

    @cached_property
    def _schedule(self) -> Any:
        from diffusers import DDPMScheduler

        hush()
        config = self.model.source.config("scheduler", "scheduler_config.json")
        if (kind := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise ErasecError(f"a model that predicts {kind!r} cannot be trained here", why="noise and v are known")
        return DDPMScheduler.from_config(config)

    @property
    def v_prediction(self) -> bool:
        return bool(self._schedule.config.prediction_type == "v_prediction")

    @property
    def steps(self) -> int:
        """How many timesteps the noise schedule has."""
        return int(self._schedule.config.num_train_timesteps)

    @cached_property
    def alphas(self) -> Tensor:
        """The schedule's cumulative products of alpha, (steps,), float32."""
        return self._schedule.alphas_cumprod.float().to(self.device)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents that the model was made for."""
        config = self.model.source.config("unet")
        return config["in_channels"], config["sample_size"], config["sample_size"]

    @property
    def size(self) -> int:
        """Height and width of the pictures that these latents are of."""
        return int(self.shape[1] * 2 ** (len(self.model.source.config("vae")["block_out_channels"]) - 1))

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) as the UNet reads them, float32 on the device; each prompt is encoded once."""
        if fresh := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]:
            self._states.update(zip(fresh, self.model.encode(fresh).states, strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts]).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 where tensor cores are; on a CPU without them it is slower than float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def predict(self, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """What the UNet says, float32 (n, c, h, w): noise, or v where the model was trained so. ``times`` is (n,)."""
        with self.autocast():
            found: Tensor = self.unet(latents, times, encoder_hidden_states=states, return_dict=False)[0]
        return found.float()

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents with noise added as the schedule has it at ``times`` (n,)."""
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a perfect UNet predicts for these: the noise, or v = sqrt(alpha) noise - sqrt(1 - alpha) latents."""
        if not self.v_prediction:
            return noise
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents

    def as_noise(self, difference: Tensor, times: Tensor) -> Tensor:
        """A difference of two predictions for the same latents as one of predicted noise: times sqrt(alpha) for v."""
        return difference * self.alphas[times].sqrt().view(-1, 1, 1, 1) if self.v_prediction else difference

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Noise (n, c, h, w), each row from its own seed, the same on every device."""
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, batch: int = 16,
        title: str = "trajectories", until: int = 0,
    ) -> Trajectories:  # fmt: skip
        """Sample by DDIM without added noise (Song et al., arXiv:2010.02502), guided from the empty prompt.

        ``until`` above 0 ends it after so many of the ``steps``.
        """
        from diffusers import DDIMScheduler

        config = self.model.source.config("scheduler", "scheduler_config.json")
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(steps)
        times_ = scheduler.timesteps[: until or None]
        parts: list[tuple[Tensor, ...]] = []
        with bar(title, len(prompts) * len(times_)) as advance:
            for start in range(0, len(prompts), batch):
                latents = self.draw(seeds[start : start + batch])
                text = self.states(prompts[start : start + batch])
                empty = self.states([""]).expand_as(text)
                path: tuple[list[Tensor], ...] = ([], [], [])
                for time in times_:
                    times = torch.full((len(latents),), int(time), device=self.device)
                    said = self.predict(latents, times, text)
                    free = self.predict(latents, times, empty) if guidance != 1 else said
                    for whole, now in zip(path, (latents, said, free), strict=True):
                        whole.append(now.cpu())
                    guided = free + guidance * (said - free)
                    latents = scheduler.step(guided, time, latents).prev_sample
                    advance(len(latents))
                parts.append((*(torch.stack(whole, 1) for whole in path), latents.cpu()))
        latents, said, free, final = (torch.cat(part) for part in zip(*parts, strict=True))
        return Trajectories(latents, times_.clone(), final, said, free[:, : 0 if guidance == 1 else None])

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 16) -> Tensor:
        """Latents (n, c, h, w) of images (n, 3, H, W) in [-1, 1]: the means that the VAE gives, scaled."""
        scale = self.vae.config.scaling_factor
        parts = [self.vae.encode(part.to(self.device)).latent_dist.mean for part in images.split(batch)]
        found: Tensor = torch.cat(parts) * scale
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of latents."""
        scale = self.vae.config.scaling_factor
        parts = [self.vae.decode(part.to(self.device) / scale).sample for part in latents.split(batch)]
        return torch.cat(parts).clamp(-1, 1)


class _Factors(nn.Module):
    """W + up @ down, as a parametrization; ``on`` is False while the teacher speaks."""

    def __init__(self, shape: torch.Size, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(shape[0], rank))
        self.on = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype) if self.on else weight


class Student:
    """The tensors that a pass trains, inside the modules that hold them: whole, or with ``rank`` as low-rank changes.

    ``modules`` are networks by component. Whole tensors are held in float32 and copied once, for the teacher; with a
    rank only matrices can be trained, and the tensors themselves stay as they are. Raises ErasecError otherwise.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sites: Sequence[Site], rank: int = 0, seed: int = 0) -> None:
        if rank and (flat := [site for site in sites if len(site.shape) != 2]):
            sites = [site for site in sites if site not in flat]
        if not sites:
            raise ErasecError("there is nothing to train", why="no site is declared, or none of them is a matrix")
        self.sites, self.rank = tuple(sites), rank
        self._places: dict[Site, tuple[nn.Module, str]] = {}
        self._before: dict[Site, nn.Parameter] = {}
        self._factors: dict[Site, _Factors] = {}
        for number, site in enumerate(self.sites):
            owner, name = _place(modules[site.component], site.key)
            self._places[site] = owner, name
            stored = getattr(owner, name)
            if rank:
                factors = _Factors(stored.shape, min(rank, *stored.shape), seed + number).to(stored.device)
                nn.utils.parametrize.register_parametrization(owner, name, factors)
                self._factors[site] = factors
            else:
                self._before[site] = stored
                setattr(owner, name, nn.Parameter(stored.detach().float().clone()))

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """What an optimizer gets, by name."""
        if self.rank:
            return {
                f"{site.component}/{site.key}/{part}": getattr(factors, part)
                for site, factors in self._factors.items() for part in ("up", "down")
            }  # fmt: skip
        return {f"{site.component}/{site.key}": getattr(*place) for site, place in self._places.items()}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the networks are as they were, and nothing that runs is recorded for a backward pass."""
        with torch.no_grad():
            now = {site: getattr(*place) for site, place in self._places.items()} if not self.rank else {}
            self._put(self._before)
            for factors in self._factors.values():
                factors.on = False
            try:
                yield
            finally:
                self._put(now)
                for factors in self._factors.values():
                    factors.on = True

    def _put(self, tensors: Mapping[Site, nn.Parameter]) -> None:
        # The parameter object is replaced, not its data: a graph that was recorded keeps what it was recorded with.
        for site, tensor in tensors.items():
            owner, name = self._places[site]
            owner._parameters[name] = tensor

    def deltas(self) -> dict[Site, Delta]:
        """The change of every site: Dense, or LowRank where there is a rank."""
        if self.rank:
            return {
                site: LowRank(factors.up.detach().double().cpu(), factors.down.detach().double().cpu())
                for site, factors in self._factors.items()
            }
        return {site: Dense(self._change(site).cpu()) for site in self.sites}

    def _change(self, site: Site) -> Tensor:
        if self.rank:
            factors = self._factors[site]
            low: Tensor = factors.up @ factors.down
            return low.detach()
        now: Tensor = getattr(*self._places[site])
        return (now - self._before[site].float()).detach()

    @torch.no_grad()
    def drift(self) -> float:
        """Frobenius norm of the change over that of the tensors before, over all sites."""
        moved = sum(float(self._change(site).square().sum()) for site in self.sites)
        return float((moved / max(self._size, 1e-30)) ** 0.5)

    @cached_property
    def _size(self) -> float:
        if self.rank:
            stored = (getattr(place[0].parametrizations, place[1]).original for place in self._places.values())
            return sum(float(tensor.float().square().sum()) for tensor in stored)
        return sum(float(tensor.float().square().sum()) for tensor in self._before.values())


def _place(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that owns a tensor, and the tensor's name in it; text encoders may lack the files' prefix."""
    path, _, name = key.rpartition(".")
    names = dict(module.named_modules())
    owner = names.get(path) or names.get(path.removeprefix("text_model.")) or names.get(f"text_model.{path}")
    if owner is None:
        raise ErasecError(f"the network has no module {path}", why=f"it is a {type(module).__name__}")
    return owner, name
