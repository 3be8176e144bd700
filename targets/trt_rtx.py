"""Target trt-rtx: TensorRT-RTX engines, built ahead of time on any machine, with or without a GPU.

Checked without a GPU: that every engine was built from just this graph and these weights, that the file is the one that
was built, and that the matrices which read the text, those that erasing changes first, lie in it byte for byte. What an
engine computes is seen where there is a GPU, by running it.
"""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.safetensors import copy, file_digest
from erasec.errors import ErasecError, nearest
from erasec.graphs import link as linker
from erasec.graphs import weights as initializers
from erasec.graphs.graph import PRECISIONS, graphs, halvings
from erasec.model import sidecar as extras
from erasec.progress import bar
from erasec.tensorrt import engines, patching
from erasec.tensorrt.engines import ENGINE, RECORD, RTX, Builder, Profile, Shape

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model

Range = tuple[int, int, int]


@dataclass(frozen=True)
class Engines(Target):
    """What both kinds of engines have in common.

    ``batch`` counts images, ``height`` and ``width`` are theirs in pixels: three numbers "least:usual:largest", or one
    that is fixed; by default sizes go from half of what the model was trained on to one and a half. ``workspace`` is in
    MiB, 0 for the library's own. ``vae`` is the VAE's precision. ``onnx`` keeps the graphs that were built, in onnx/.
    """

    precision: str = "fp16"
    vae: str = "fp32"
    batch: str = "1:1:4"
    height: str = ""
    width: str = ""
    workspace: int = 0
    vae_encoder: bool = False
    onnx: bool = False

    holds: ClassVar[frozenset[str]] = extras.KINDS

    def __post_init__(self) -> None:
        for option in ("precision", "vae"):
            if (given := getattr(self, option)) not in PRECISIONS:
                raise ErasecError(f"{self.name}: option {option} is {given!r}", why=nearest(given, PRECISIONS))
        for option in ("batch", "height", "width"):
            if given := getattr(self, option):
                range_of(f"{self.name}: option {option}", given)
        if self.workspace < 0:
            raise ErasecError(f"{self.name}: option workspace is {self.workspace}", why="it is in MiB, 0 or above")

    @abstractmethod
    def builder(self) -> Builder:
        """What builds the engines."""

    def check(self) -> None:
        engines.require(self.builder().library)

    def size(self, model: Model) -> int:
        """The engines, and as much again for the graphs that they are built from.

        Raises ErasecError where those do not cover the model, or it cannot take the sizes.
        """
        graphs(model.source)
        self.profiles(model.source)
        return super().size(model) * (1 if self.precision == "fp16" else 2)

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, build an engine of each, one at a time, and check them. Raises ErasecError."""
        self.check()
        every, entries, library = self.profiles(checkpoint), dict[str, dict[str, Any]](), ""
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch, bar(self.name, len(every)) as advance:
            linked = Path(scratch) / "onnx"
            linker.write(checkpoint, linked, self.precision, tuple(every), vae=self.vae, origin=context.origin)
            for path in sorted(linked.rglob("*")):
                if path.is_file() and not path.name.startswith("model.") and path.name != linker.MANIFEST:
                    copy(path, out / path.relative_to(linked))
            for name, profile in every.items():
                advance(0, name)
                entries[name], library = self.engine(linked / name / "model.onnx", out / name / ENGINE, profile)
                entries[name]["precision"] = self.vae if name.startswith("vae") else self.precision
                advance()
            engines.write_record(out, self.builder(), library, entries)
            checks = [check for name in every for check in checked(out, name, linked / name / "model.onnx")]
            if self.onnx:
                os.replace(linked, out / "onnx")
        return Artifact(self.name, out, tuple(checks))

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        """Make one engine: its entry in engine.json, and the version of the library."""
        return engines.build(graph, file, profile, self.builder())

    def profiles(self, checkpoint: Folder) -> dict[str, Profile]:
        """Shapes of the inputs by component. Raises ErasecError for a model that has no such graphs, or another size.

        The UNet and the text encoder see each image twice, with its prompt and with the empty one; one alone will do.
        """
        graphs(checkpoint)  # refuses in words what has other components or inputs
        unet, text, vae = (checkpoint.config(name) for name in ("unet", "text_encoder", "vae"))
        step, scale = halvings(unet), halvings(vae)
        images = range_of("batch", self.batch)
        sizes = {}
        own = unet["sample_size"]
        for option, usual in zip(("height", "width"), own if isinstance(own, list) else (own, own), strict=True):
            least, most = max(usual // 2 // step, 1) * step, -(-usual * 3 // 2 // step) * step
            given = getattr(self, option) or f"{scale * least}:{scale * usual}:{scale * most}"
            pixels = range_of(option, given)
            if wrong := [size for size in pixels if size % (scale * step)]:
                raise ErasecError(
                    f"{self.name}: option {option} has {wrong[0]}",
                    why=f"this model's pictures are multiples of {scale * step} pixels",
                )
            sizes[option] = [size // scale for size in pixels]
        twice = images[0], 2 * images[1], 2 * images[2]
        length = text["max_position_embeddings"]

        def latents(batch: Range, channels: int, by: int = 1) -> list[Shape]:
            each = zip(batch, sizes["height"], sizes["width"], strict=True)
            return [(count, channels, by * height, by * width) for count, height, width in each]

        every: dict[str, Profile] = {
            # However many images there are, their prompts may all be the same.
            "text_encoder": {"input_ids": [(count, length) for count in (1, *twice[1:])]},
            "unet": {
                "sample": latents(twice, unet["in_channels"]),
                "encoder_hidden_states": [(count, length, unet["cross_attention_dim"]) for count in twice],
            },
            "vae_decoder": {"latent_sample": latents(images, vae["latent_channels"])},
        }
        if self.vae_encoder:
            every["vae_encoder"] = {"sample": latents(images, vae["in_channels"], scale)}
        return every


@dataclass(frozen=True)
class TrtRtx(Engines):
    """``capabilities`` are the GPUs to build for, as in "80+89"; by default engines are for 8.0 and all later ones.
    ``patch`` writes an edit into an engine that was built before, where that has been proven."""

    capabilities: str = ""
    patch: bool = False

    name: ClassVar[str] = "trt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX engines, built ahead of time with or without a GPU"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.builder().capabilities if name not in engines.CAPABILITIES]:
            raise ErasecError(
                f"trt-rtx: option capabilities has {unknown[0]!r}",
                why=f"it can be of {', '.join(engines.CAPABILITIES)}",
                fix='join several by "+": capabilities="80+89"',
            )  # fmt: skip

    def builder(self) -> Builder:
        return Builder(RTX, tuple(self.capabilities.split("+")) if self.capabilities else (), self.workspace)

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        if self.patch and graph.parent.name == "unet":
            return patching.engine(graph, file, profile, self.builder())
        return super().engine(graph, file, profile)


def range_of(label: str, text: str) -> Range:
    """Least, usual and largest size from "1:2:4", or one that is fixed from "2". Raises ErasecError."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) in (1, 3) and all(part.isdecimal() for part in parts):
        low, usual, high = map(int, parts * 3 if len(parts) == 1 else parts)
        if 0 < low <= usual <= high:
            return low, usual, high
    raise ErasecError(f"{label} is {text!r}", why='it is three rising numbers "least:usual:largest", or one')


def checked(folder: Path, name: str, graph: Path) -> tuple[Check, ...]:
    """Checks of one engine in a folder against the ONNX file that it should have been built from."""
    told = engines.read_record(folder)
    entry, builder = told["components"][name], told["builder"]
    file, sources = folder / entry["file"], dict(zip(("graph", "weights"), initializers.digests(graph), strict=True))
    other = [kind for kind, digest in sources.items() if digest != entry[kind]]
    if not file.is_file() or file_digest(file) != entry["engine"]:
        other.append("engine")
    how = f"of the sha256 of graph, weights and engine, those that are not what {RECORD} says"
    how += f": {', '.join(other)}" if other else ""
    made = f"{builder['name']} {builder['version']}"
    checks = [Check(f"engine/{name}/source", float(len(other)), 0.0, not other, how)]
    if name == "unet" and builder["name"] == RTX and file.is_file():
        checks.append(_text(file, graph, made))
    checks.append(Check(f"engine/{name}/MB", entry["bytes"] / 1e6, None, True, f"size of {entry['file']}"))
    checks.append(Check(f"engine/{name}/seconds", entry["seconds"], None, True, f"to build it, with {made}"))
    return tuple(checks)


def _text(file: Path, graph: Path, made: str) -> Check:
    """Count the matrices that read the text and are not in the engine byte for byte."""
    matrices = patching.projections(graph)
    lost = sorted(matrices.keys() - patching.locate(file, matrices).keys())
    how = f"matrices of {len(matrices)} that read the text and are not in the engine, byte for byte; keys times a scale"
    how += f"; the first is {lost[0]}" if lost else ""
    # Another version of the library may keep them in a way that is not known here; then none is found.
    judged = made.split()[1].startswith(patching.KNOWN) or len(lost) < len(matrices)
    how += "" if judged else f"; told only, as it is not known how {made} keeps them"
    return Check("engine/unet/text", float(len(lost)), 0.0 if judged else None, not lost or not judged, how)
