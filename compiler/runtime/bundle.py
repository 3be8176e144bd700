"""Images from what was built, by whatever runs it: ONNX Runtime and OpenVINO need neither torch nor diffusers here.

The loop over the steps is the same for all, in numpy, and so are the seeds. What a check or an audit sees is then the
artifact, and not the checkpoint that it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import atomic
from erasec.errors import ErasecError, nearest
from erasec.progress import bar
from erasec.runtime.backends import FILES, Graphs, Torch, carried
from erasec.runtime.schedulers import sampler
from erasec.runtime.torch_randn import normal

if TYPE_CHECKING:
    from erasec.runtime.backends import Component, Parts

Array = NDArray[Any]
Images = NDArray[np.uint8]
# Where a build puts the folders of each backend, in the order of "auto".
TARGETS = {"ort": ("onnx",), "openvino": ("openvino",), "trt-rtx": ("trt-rtx",), "trt": ("trt",),
           "torch": ("bundle", "hf")}  # fmt: skip


@dataclass
class Bundle:
    """A folder that was built, run by ``backend``. Components are loaded when they are first run, and then kept."""

    root: Path
    backend: str
    parts: Parts
    _open: dict[str, Component] = field(default_factory=dict)

    def run(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the component text_encoder, unet, vae_decoder or vae_encoder, by name, as its ONNX graph has them.

        Raises ErasecError where it is not there or cannot be loaded.
        """
        if name not in self._open:
            self._open[name] = self.parts.open(name)
        return self._open[name].run(inputs)

    def drop(self, name: str) -> None:
        """Let a component go; it is loaded again when it is next run."""
        if component := self._open.pop(name, None):
            component.close()

    def close(self) -> None:
        """``drop`` all."""
        for name in list(self._open):
            self.drop(name)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's config. Raises ErasecError where it is missing or damaged."""
        path = self.root / component / name
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ErasecError(
                f"the bundle has no {component}/{name} that can be read", why=str(error), where=str(self.root),
                fix="build it again; it needs its configs beside the graphs",
            ) from error  # fmt: skip
        return config

    def states(self, texts: Sequence[str], batch: int) -> Array:
        """Text states (n, t, d) in float32."""
        states = [
            self.run("text_encoder", {"input_ids": self.parts.ids(texts[at : at + batch])})["last_hidden_state"]
            for at in range(0, len(texts), batch)
        ]
        return np.concatenate(states)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int = 25, guidance: float = 7.5,
        negative: str | None = None, height: int | None = None, width: int | None = None, scheduler: str = "auto",
        batch: int | None = None,
    ) -> Images:  # fmt: skip
        """Images (n, height, width, 3), each from its own seed, as StableDiffusionPipeline makes them.

        Where no ``negative`` prompt is given, it is the bundle's own, if it has one. Guidance of 1 and below is none.
        Sizes are in pixels, by default the model's; ``batch`` is how many are made at a time. Raises ErasecError for
        what the model or the backend cannot do, and where a picture is not finite.
        """
        batch = batch or self.parts.batch
        if not prompts or len(prompts) != len(seeds):
            raise ErasecError(f"there are {len(prompts)} prompts and {len(seeds)} seeds", why="each prompt needs one")
        unet, vae = self.config("unet"), self.config("vae" if self.backend == "torch" else "vae_decoder")
        shape = latent_shape(unet, vae, height, width, torch=self.backend == "torch")
        schedule = self.config("scheduler", "scheduler_config.json")
        # What StableDiffusionPipeline makes of every scheduler that it is given.
        schedule |= {"steps_offset": 1, "clip_sample": False}
        walk = len(sampler(schedule, steps, scheduler).timesteps)
        texts = [carried(self.root)[0] if negative is None else negative, *prompts]
        different = list(dict.fromkeys(texts))
        rows = dict(zip(different, self.states(different, batch), strict=True))
        chunks = []
        with bar("run", walk * -(-len(prompts) // batch)) as advance:
            for at in range(0, len(prompts), batch):
                prompted = np.stack([rows[prompt] for prompt in prompts[at : at + batch]])
                empty = np.stack([rows[texts[0]]] * len(prompted))
                stepper = sampler(schedule, steps, scheduler)
                latents = np.concatenate([normal(seed, (1, *shape)) for seed in seeds[at : at + batch]])
                latents *= np.float32(stepper.start)
                for index, timestep in enumerate(stepper.timesteps):
                    read = stepper.scaled(index, latents)
                    output = self._denoised(read, timestep, empty, prompted, guidance)
                    latents = stepper.step(index, output, latents)
                    advance()
                chunks.append(self._decoded(latents / np.float32(vae.get("scaling_factor", 0.18215))))
        return np.concatenate(chunks)

    def _denoised(self, latents: Array, timestep: float, empty: Array, prompted: Array, guidance: float) -> Array:
        """The denoiser's output for latents (n, c, h, w) and text states (n, t, d), guided away from ``empty``'s."""
        count = len(latents)
        if guidance > 1:
            both = self._unet(np.concatenate([latents] * 2), timestep, np.concatenate([empty, prompted]))
            return both[:count] + np.float32(guidance) * (both[count:] - both[:count])
        # An even batch is taken for a guided one, in whose first half a memory may not act: so one more is run.
        odd = [*range(count), *([0] if count % 2 == 0 else [])]
        return self._unet(latents[odd], timestep, prompted[odd])[:count]

    def _unet(self, latents: Array, timestep: float, states: Array) -> Array:
        inputs = {"sample": latents, "timestep": np.array(timestep, np.float32), "encoder_hidden_states": states}
        return self.run("unet", inputs)["out_sample"]

    def _decoded(self, latents: Array) -> Images:
        pictures = self.run("vae_decoder", {"latent_sample": latents})["sample"]
        if not np.isfinite(pictures).all():
            raise ErasecError(
                "a picture is not finite", why="somewhere a number went beyond what the graphs' precision holds",
                where=str(self.root), fix="build it with precision=fp32",
            )  # fmt: skip
        pixels = (pictures / 2 + np.float32(0.5)).clip(0, 1).transpose(0, 2, 3, 1)
        images: Images = np.rint(pixels * 255).astype(np.uint8)
        return images


def open_bundle(path: Path, backend: str = "auto", threads: int | None = None) -> Bundle:
    """What was built in ``path``: a target's folder, or a build with several, of which the backend chooses one.

    ``backend`` is one of ``TARGETS``, or "auto" for the first of them that is there; ``threads`` is how many to compute
    with, by default the library's choice. Raises ErasecError where there is no such bundle, MissingTool where its
    library is not installed.
    """
    if backend not in ("auto", *TARGETS):
        raise ErasecError(f"there is no backend {backend!r}", why=nearest(backend, ("auto", *TARGETS)))
    if not path.is_dir():
        raise ErasecError(f"there is no bundle {path}", why="it is no folder", fix="give the folder of a build")
    places = [(name, path) for name in TARGETS]
    places += [(name, path / folder) for name, folders in TARGETS.items() for folder in folders]
    # One after the other, so that what is not asked for may be damaged.
    found = next((place for place in places if backend in ("auto", place[0]) and _is(*place)), None)
    if found is None:
        there = dict.fromkeys(name for name, folder in places if _is(name, folder))
        if there:
            raise ErasecError(
                f"{path} has nothing for the backend {backend}", why=f"it has what {', '.join(there)} runs",
                fix=f"build it for it: --target {TARGETS[backend][0]}",
            )  # fmt: skip
        raise ErasecError(
            f"{path} is no bundle", why="it has no folder unet with a graph, an engine or safetensors", where=str(path),
            fix="erasec build MODEL --erase CONCEPT --target onnx   makes one",
        )  # fmt: skip
    chosen, root = found
    return Bundle(root, chosen, Torch(root, threads) if chosen == "torch" else Graphs(root, chosen, threads))


def _is(backend: str, folder: Path) -> bool:
    """Whether ``folder`` is one that ``backend`` runs."""
    if backend == "torch":
        return (folder / "model_index.json").is_file() and any((folder / "unet").glob("*.safetensors*"))
    if not (folder / "unet" / FILES[backend]).is_file():
        return False
    if FILES[backend] == "model.engine":
        from erasec.tensorrt.engines import TARGETS as NAMES
        from erasec.tensorrt.engines import read_record

        return NAMES[read_record(folder)["builder"]["name"]] == backend
    return True


def latent_shape(
    unet: Mapping[str, Any], vae: Mapping[str, Any], height: int | None, width: int | None, torch: bool = False
) -> tuple[int, int, int]:
    """Channels, height and width of latents for a picture in pixels, by default of the model's own size.

    Raises ErasecError for a size that the model, or its exported graph, cannot halve as often as it must.
    """
    channels = unet.get("in_channels", 4)
    if channels != vae.get("latent_channels", 4):
        raise ErasecError(
            f"the denoiser takes {channels} channels, and the decoder {vae.get('latent_channels', 4)}",
            why="such a model paints into a picture, and here there is none",
        )  # fmt: skip
    scale, own = 2 ** (len(vae["block_out_channels"]) - 1), unet["sample_size"]
    # diffusers mends odd sizes between two levels of a UNet; an exported graph has no such branch.
    unit = scale if torch else scale * 2 ** (len(unet["block_out_channels"]) - 1)
    sizes = []
    for name, asked, latents in zip(
        ("height", "width"), (height, width), own if isinstance(own, Sequence) else (own, own), strict=True
    ):
        pixels = latents * scale if asked is None else asked
        if pixels < unit or pixels % unit:
            near = max(1, round(pixels / unit)) * unit
            raise ErasecError(
                f"the {name} cannot be {pixels}", why=f"it must be a multiple of {unit}", fix=f"--{name} {near}"
            )
        sizes.append(pixels // scale)
    return channels, sizes[0], sizes[1]


def files(out: Path, count: int) -> list[Path]:
    """Where ``count`` pictures go: ``out``, or x-0.png, x-1.png and so on for several.

    Raises ErasecError where Pillow writes no pictures of that suffix.
    """
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise ErasecError(
            f"no picture is written as {out.name}", why=f"the suffix {out.suffix!r} is not one that Pillow writes",
            fix="give a name that ends in .png, .jpg or .webp",
        )  # fmt: skip
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(count)]


def save(images: Images, paths: Sequence[Path]) -> None:
    """Write images (n, h, w, 3) to ``paths``, each whole or not at all."""
    from PIL import Image

    for image, path in zip(images, paths, strict=True):
        with atomic(path) as temporary:
            Image.fromarray(image).save(temporary, Image.registered_extensions()[path.suffix.lower()])
