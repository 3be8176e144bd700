"""Images from what was built, in whichever runtime runs it. ONNX Runtime and OpenVINO need neither torch nor diffusers.

The denoising loop, in numpy, and the initial noise are the same for every runtime. So a check or an audit sees what the
built files compute, and not the checkpoint that they were built from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec import registry
from erasec.checkpoint.configs import Config, read_config
from erasec.checkpoint.folder import downscale, trained_size
from erasec.errors import ErasecError, suggestion
from erasec.graphs.signature import INPUTS, OUTPUTS, pixel_unit
from erasec.progress import bar
from erasec.runtime.backends import carried_text
from erasec.runtime.schedulers import make_scheduler
from erasec.runtime.torch_randn import randn

if TYPE_CHECKING:
    from erasec.base import Images
    from erasec.runtime.backends import Component, Components

Array = NDArray[Any]


@dataclass
class Bundle:
    """A built folder and the runtime ``backend`` that runs it. Components are loaded when they first run, and kept."""

    root: Path
    backend: str
    components: Components
    _open: dict[str, Component] = field(default_factory=dict)

    def run(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name of the component text_encoder, unet, vae_decoder or vae_encoder, as its ONNX graph has them.

        Raises ErasecError where the component is missing or cannot be loaded.
        """
        if name not in self._open:
            self._open[name] = self.components.open(name)
        return self._open[name].run(inputs)

    def _first_output(self, name: str, *inputs: Array) -> Array:
        """The first output of a component, for its inputs in the graph's order."""
        return self.run(name, dict(zip(INPUTS[name], inputs, strict=True)))[OUTPUTS[name][0]]

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

    def states(self, texts: Sequence[str], batch: int) -> Array:
        """Text states (n, t, d) in float32, encoded ``batch`` at a time."""
        chunks = [texts[start : start + batch] for start in range(0, len(texts), batch)]
        return np.concatenate([self._first_output("text_encoder", self.components.ids(chunk)) for chunk in chunks])

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 25,
        guidance: float = 7.5,
        negative: str | None = None,
        height: int | None = None,
        width: int | None = None,
        scheduler: str = "auto",
        batch: int | None = None,
    ) -> Images:
        """Images (n, height, width, 3), each from its own seed, as StableDiffusionPipeline makes them.

        ``negative`` is by default the bundle's own negative prompt, or the empty one. ``guidance`` of at most 1 turns
        guidance off. ``height`` and ``width`` are in pixels, by default the model's; ``batch`` is how many images are
        made at a time. Raises ErasecError for a size, scheduler or number of steps that the model or the runtime does
        not support, and where an image is not finite.
        """
        batch = batch or self.components.batch
        if not prompts or len(prompts) != len(seeds):
            raise ErasecError(
                f"there are {len(prompts)} prompts and {len(seeds)} seeds", why="every prompt needs one seed"
            )
        unet, vae = self.config("unet"), self.config("vae" if self.backend == "torch" else "vae_decoder")
        shape = latent_shape(unet, vae, height, width, torch=self.backend == "torch")
        scheduler_config = self.config("scheduler", "scheduler_config.json")
        # StableDiffusionPipeline overrides these two options of every scheduler.
        scheduler_config |= {"steps_offset": 1, "clip_sample": False}
        evaluations = len(make_scheduler(scheduler_config, steps, scheduler).timesteps)
        texts = [carried_text(self.root)[0] if negative is None else negative, *prompts]
        distinct = list(dict.fromkeys(texts))
        states = dict(zip(distinct, self.states(distinct, batch), strict=True))
        images = []
        with bar("run", evaluations * -(-len(prompts) // batch)) as advance:
            for first in range(0, len(prompts), batch):
                conditional = np.stack([states[prompt] for prompt in prompts[first : first + batch]])
                unconditional = np.stack([states[texts[0]]] * len(conditional))
                stepper = make_scheduler(scheduler_config, steps, scheduler)
                latents = np.concatenate([randn(seed, (1, *shape)) for seed in seeds[first : first + batch]])
                latents *= np.float32(stepper.start)
                for index, timestep in enumerate(stepper.timesteps):
                    scaled = stepper.scaled(index, latents)
                    prediction = self._guided_prediction(scaled, timestep, unconditional, conditional, guidance)
                    latents = stepper.step(index, prediction, latents)
                    advance()
                images.append(self._decode(latents / np.float32(vae.get("scaling_factor", 0.18215))))
        return np.concatenate(images)

    def _guided_prediction(
        self, latents: Array, timestep: float, unconditional: Array, conditional: Array, guidance: float
    ) -> Array:
        """The UNet's prediction for latents (n, c, h, w) and both text states (n, t, d), with guidance where above 1.

        Classifier-free guidance (arXiv 2207.12598): unconditional + guidance (conditional - unconditional).
        """
        count = len(latents)
        step = np.array(timestep, np.float32)
        if guidance > 1:
            states = np.concatenate([unconditional, conditional])
            both = self._first_output("unet", np.concatenate([latents] * 2), step, states)
            return both[:count] + np.float32(guidance) * (both[count:] - both[:count])
        # A memory may act on the second half of an even batch only, as guidance puts the conditional rows there. So an
        # even batch without guidance is made odd: its first row is run twice.
        rows = [*range(count), *([0] if count % 2 == 0 else [])]
        return self._first_output("unet", latents[rows], step, conditional[rows])[:count]

    def _decode(self, latents: Array) -> Images:
        """Images (n, height, width, 3) from latents (n, c, h, w). Raises ErasecError where one is not finite."""
        decoded = self._first_output("vae_decoder", latents)
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
        why="it has no folder unet with a graph, an engine or safetensors",
        where=str(path),
        fix="erasec build MODEL --erase CONCEPT --target onnx   makes one",
    )


def latent_shape(
    unet: Mapping[str, Any], vae: Mapping[str, Any], height: int | None, width: int | None, torch: bool = False
) -> tuple[int, int, int]:
    """Channels, height and width of latents for an image in pixels, by default of the model's own size.

    ``unet`` and ``vae`` are configs. Raises ErasecError for an inpainting model, and for a size that the model, or its
    exported graph, cannot downscale.
    """
    channels, decoded = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != decoded:
        raise ErasecError(
            f"the denoiser takes {channels} channels, and the decoder {decoded}",
            why="a model for inpainting needs an image to start from",
            fix="use a text-to-image model",
        )
    scale = downscale(vae)
    unit = scale if torch else pixel_unit(unet, vae)
    sizes = []
    for name, requested, default in zip(("height", "width"), (height, width), trained_size(unet), strict=True):
        pixels = default * scale if requested is None else requested
        if pixels < unit or pixels % unit:
            nearest_size = max(1, round(pixels / unit)) * unit
            raise ErasecError(
                f"the {name} cannot be {pixels}", why=f"it must be a multiple of {unit}", fix=f"--{name} {nearest_size}"
            )
        sizes.append(pixels // scale)
    return channels, sizes[0], sizes[1]
