"""Images from what was built, in whichever runtime runs it. ONNX Runtime and OpenVINO need neither torch nor diffusers.

The denoising loop, in numpy, and the initial noise are the same for every runtime. So a check or an audit sees what the
built files compute, and not the checkpoint that they were built from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec import registry
from erasec.checkpoint.configs import Config, read_config, read_index
from erasec.checkpoint.folder import PATCH, TRANSFORMER, Folder, downscale, trained_size
from erasec.errors import ErasecError, suggestion
from erasec.graphs import conditioning
from erasec.graphs.signature import DENOISERS, FLUX, LAYOUTS, T5, TEXT_STATES, configs, layout, pixel_unit
from erasec.progress import bar
from erasec.runtime.backends import carried_text
from erasec.runtime.schedulers import make_scheduler
from erasec.runtime.torch_randn import randn

if TYPE_CHECKING:
    from erasec.base import Images
    from erasec.runtime.backends import Component, Components

Array = NDArray[Any]
Arrays = dict[str, Array]
# The guidance of diffusers' pipelines where a caller gives none, by layout.
GUIDANCE = {"sd": 7.5, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5}


@dataclass
class Bundle:
    """A built folder and the runtime ``backend`` that runs it. Components are loaded when they first run, and kept."""

    root: Path
    backend: str
    components: Components
    _open: dict[str, Component] = field(default_factory=dict)

    def run(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name of a component such as text_encoder, unet or vae_decoder, as its ONNX graph has them.

        Raises ErasecError where the component is missing or cannot be loaded.
        """
        if name not in self._open:
            self._open[name] = self.components.open(name)
        return self._open[name].run(inputs)

    def drop(self, name: str) -> None:
        """Release a component; it is loaded again when it next runs."""
        if component := self._open.pop(name, None):
            component.close()

    def close(self) -> None:
        """Release all components."""
        for name in list(self._open):
            self.drop(name)

    def config(self, component: str, name: str = "config.json") -> Config:
        """A component's config. Raises ErasecError where it is missing or damaged."""
        return read_config(self.root, component, name)

    @cached_property
    def layout(self) -> str:
        """The layout of the model, one of ``signature.LAYOUTS``. Raises ErasecError for a model of another one."""
        indexed = (self.root / "model_index.json").is_file()  # folders of runtimes of other packages may have none
        return layout(Folder(self.root)) if indexed else "sd"

    @property
    def flow(self) -> bool:
        """Whether the denoiser predicts velocities of a rectified flow."""
        return self.denoiser == "transformer"

    @cached_property
    def configs(self) -> dict[str, Config]:
        """The configs of the components, by name."""
        if (self.root / "model_index.json").is_file():
            return configs(Folder(self.root))
        return {"unet": self.config("unet"), "vae": self.config("vae_decoder")}

    @property
    def denoiser(self) -> str:
        """The name of the component that denoises: unet or transformer."""
        return next(name for name in DENOISERS if name in LAYOUTS[self.layout])

    def text_read(self, text: str) -> dict[str, str]:
        """The part of ``text`` that each text encoder reads, by the encoder."""
        others = [name for name in self.configs if name.startswith("text_encoder_")]
        read = {name: self.components.text_read(text, name) for name in others}
        return {"the text encoder" if not others else "text_encoder": self.components.text_read(text)} | read

    def text_inputs(self, texts: Sequence[str], batch: int) -> Arrays:
        """What the denoiser reads of texts, by the names of its inputs: text states (n, t, d) in float32, and pooled
        ones (n, d). The texts are encoded ``batch`` at a time, by one encoder after the other."""

        def encode(name: str) -> Arrays:
            # Runtimes of other packages may know the first encoder alone.
            ids = self.components.ids(texts, name) if name != "text_encoder" else self.components.ids(texts)
            parts = [self.run(name, {"input_ids": ids[at : at + batch]}) for at in range(0, len(texts), batch)]
            if LAYOUTS[self.layout].get(name) == T5:  # which takes as much memory as the denoiser
                self.drop(name)
            return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

        return conditioning.text_inputs(self.layout, self.configs, encode)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 25,
        guidance: float | None = None,
        negative: str | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str = "auto",
        batch: int | None = None,
    ) -> Images:
        """Images (n, height, width, 3), each from its own seed, as the pipeline of the model in diffusers makes them.

        ``negative`` is by default the bundle's own negative prompt, or the empty one. ``guidance`` is by default the
        pipeline's; at most 1 turns it off. FLUX reads it as a number, and takes no negative prompt. ``height`` and
        ``width`` are in pixels, by default the model's; ``batch`` is how many images are made at a time. Raises
        ErasecError for a size, scheduler or number of steps that the model or the runtime does not support, and where
        an image is not finite.
        """
        batch = batch or self.components.batch
        if not prompts or len(prompts) != len(seeds):
            raise ErasecError(
                f"there are {len(prompts)} prompts and {len(seeds)} seeds", why="every prompt needs one seed"
            )
        guidance = GUIDANCE[self.layout] if guidance is None else guidance
        if negative and self.layout == "flux":
            raise ErasecError("FLUX takes no negative prompt", why="its guidance is distilled", fix="leave it out")
        shape = latent_shape(self.configs[self.denoiser], self.configs["vae"], height, width, self.backend == "torch")
        patches = pixel_patches(self.layout, shape)
        config = self._scheduler_config()
        evaluations = len(make_scheduler(config, steps, scheduler, patches, self.flow).timesteps)
        unwanted = carried_text(self.root)[0] if negative is None else negative
        distinct = list(dict.fromkeys([unwanted, *prompts]))
        texts = self.text_inputs(distinct, batch)
        rows = [distinct.index(prompt) for prompt in prompts]
        empty = select(texts, [0])
        if self.layout == "sdxl" and not unwanted and negative is None:
            empty = conditioning.without_prompt(empty, read_index(self.root))
        vae, images = self.configs["vae"], []
        # The pipelines of UNets do not read the shift.
        shift = vae.get("shift_factor") or 0 if self.flow else 0
        with bar("run", evaluations * -(-len(prompts) // batch)) as advance:
            for first in range(0, len(prompts), batch):
                conditional = select(texts, rows[first : first + batch])
                stepper = make_scheduler(config, steps, scheduler, patches, self.flow)
                latents = np.concatenate([randn(seed, (1, *shape)) for seed in seeds[first : first + batch]])
                latents *= np.float32(stepper.start)
                for number, timestep in enumerate(stepper.timesteps):
                    scaled = stepper.scaled(number, latents)
                    prediction = self._guided_prediction(scaled, timestep, empty, conditional, guidance)
                    latents = stepper.step(number, prediction, latents)
                    advance()
                latents = latents / np.float32(vae.get("scaling_factor", 0.18215))
                images.append(self._decode(latents + np.float32(shift)))
        return np.concatenate(images)

    def _scheduler_config(self) -> Config:
        config = self.config("scheduler", "scheduler_config.json")
        # StableDiffusionPipeline overrides these two options of every scheduler.
        if self.layout == "sd":
            config |= {"steps_offset": 1, "clip_sample": False}
        return config

    def _guided_prediction(
        self, latents: Array, timestep: float, empty: Arrays, conditional: Arrays, guidance: float
    ) -> Array:
        """The denoiser's prediction for latents (n, c, h, w), with guidance where above 1.

        ``conditional`` is what it reads of n prompts, and ``empty`` of the one that guidance leads away from.
        Classifier-free guidance (arXiv 2207.12598): unconditional + guidance (conditional - unconditional).
        """
        count = len(latents)
        if guidance > 1 and self.layout != "flux":
            texts = {name: np.concatenate([np.repeat(empty[name], count, 0), conditional[name]]) for name in empty}
            both = self._prediction(np.concatenate([latents] * 2), timestep, texts)
            return both[:count] + np.float32(guidance) * (both[count:] - both[:count])
        # A memory may act on the second half of an even batch only, as guidance puts the conditional rows there. So an
        # even batch without guidance is made odd: its first row is run twice.
        rows = [*range(count), *([0] if count % 2 == 0 and self.layout in ("sd", "sdxl") else [])]
        return self._prediction(latents[rows], timestep, select(conditional, rows), guidance)[:count]

    def _prediction(self, latents: Array, timestep: float, texts: Arrays, guidance: float = 1.0) -> Array:
        """The denoiser's prediction for latents (n, c, h, w) and what it reads of n texts."""
        count, _, height, width = latents.shape
        size, tokens = (count, height, width), texts[TEXT_STATES].shape[1]
        inputs = conditioning.denoiser_inputs(self.layout, latents, timestep) | texts
        inputs |= conditioning.picture_inputs(self.layout, self.configs, size, tokens, guidance)
        return conditioning.prediction(self.layout, self.run(self.denoiser, inputs), height, width)

    def _decode(self, latents: Array) -> Images:
        """Images (n, height, width, 3) from latents (n, c, h, w). Raises ErasecError where one is not finite."""
        decoded = self.run("vae_decoder", {"latent_sample": latents})["sample"]
        if not np.isfinite(decoded).all():
            raise ErasecError(
                "an image is not finite",
                why="a number exceeded the range of the graphs' precision",
                where=str(self.root),
                fix="build it with precision=fp32",
            )
        pixels = (decoded / 2 + np.float32(0.5)).clip(0, 1).transpose(0, 2, 3, 1)
        images: Images = np.rint(pixels * 255).astype(np.uint8)
        return images


def select(arrays: Arrays, rows: Sequence[int]) -> Arrays:
    """The ``rows`` of each array."""
    return {name: values[list(rows)] for name, values in arrays.items()}


def pixel_patches(layout: str, shape: tuple[int, int, int]) -> int:
    """The patches of latents of ``shape`` (c, h, w), on whose number the schedule of FLUX depends; 0 for others."""
    return shape[1] // 2 * (shape[2] // 2) if layout == "flux" else 0


def open_bundle(path: Path, backend: str = "auto", threads: int | None = None) -> Bundle:
    """The bundle in ``path``: the folder of one target, or a build with the folders of several.

    ``backend`` names a registered runtime, or a class as "file.py:Class"; "auto" takes the first registered one that
    runs a folder there. ``threads`` is the number of threads, by default the library's choice. Raises ErasecError where
    there is no folder that the runtime runs; later, when a component is loaded, MissingTool where the runtime's library
    is not installed.
    """
    names = (backend,) if ":" in backend else tuple(registry.runtimes())
    if backend not in ("auto", *names):
        raise ErasecError(f"there is no backend {backend!r}", why=suggestion(backend, ("auto", *names)))
    if not path.is_dir():
        raise ErasecError(f"there is no bundle {path}", why="it is no folder", fix="give the folder of a build")
    runtimes = {name: registry.load_runtime(name) for name in names}
    candidates = [(name, path) for name in names]
    candidates += [(name, path / folder) for name, runtime in runtimes.items() for folder in runtime.folders]
    # Folders of other backends are not examined, as they may be damaged.
    wanted = [(name, folder) for name, folder in candidates if backend in ("auto", name)]
    match = next(((name, folder) for name, folder in wanted if runtimes[name].runs(folder)), None)
    if match is None:
        able = dict.fromkeys(name for name, folder in candidates if runtimes[name].runs(folder))
        target = runtimes[backend].folders[0] if backend in runtimes else names[0]
        raise _no_match(backend, path, list(able), target)
    name, root = match
    return Bundle(root, name, runtimes[name].open(root, threads))


def _no_match(backend: str, path: Path, able: Sequence[str], target: str) -> ErasecError:
    """The error for a folder that ``backend`` does not run; ``able`` are the names of the runtimes that do."""
    if able:
        return ErasecError(
            f"{path} has nothing for the backend {backend}",
            why=f"it has what {', '.join(able)} runs",
            fix=f"build it for that backend: --target {target}",
        )
    return ErasecError(
        f"{path} is no bundle",
        why="it has no folder unet or transformer with a graph, an engine or safetensors",
        where=str(path),
        fix="erasec build MODEL --erase CONCEPT --target onnx   makes one",
    )


def latent_shape(
    denoiser: Mapping[str, Any], vae: Mapping[str, Any], height: int | None, width: int | None, torch: bool = False
) -> tuple[int, int, int]:
    """Channels, height and width of latents for an image in pixels, by default of the model's own size.

    ``denoiser`` and ``vae`` are configs. In ``torch``, a UNet takes sizes that its graph does not. Raises ErasecError
    for an inpainting model, and for a size that the model cannot downscale, or has no positions for.
    """
    channels, decoded = denoiser.get("in_channels", 4), vae.get("latent_channels", 4)
    if denoiser.get("_class_name") == FLUX:  # it reads patches of 2 x 2 latents as channels
        channels //= 4
    if channels != decoded:
        raise ErasecError(
            f"the denoiser takes {channels} channels, and the decoder {decoded}",
            why="a model for inpainting needs an image to start from",
            fix="use a text-to-image model",
        )
    scale = downscale(vae)
    unit = scale if torch and TRANSFORMER not in denoiser else pixel_unit(denoiser, vae)
    largest = scale * PATCH * int(denoiser.get("pos_embed_max_size") or 0)
    sizes = []
    for name, requested, default in zip(("height", "width"), (height, width), trained_size(denoiser), strict=True):
        pixels = default * scale if requested is None else requested
        if pixels < unit or pixels % unit:
            nearest_size = max(1, round(pixels / unit)) * unit
            raise ErasecError(
                f"the {name} cannot be {pixels}", why=f"it must be a multiple of {unit}", fix=f"--{name} {nearest_size}"
            )
        if largest and pixels > largest:
            raise ErasecError(
                f"the {name} cannot be {pixels}", f"this model paints up to {largest}", f"--{name} {largest}"
            )
        sizes.append(pixels // scale)
    return channels, sizes[0], sizes[1]
