"""What the targets trt and trt-rtx have in common."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import downscale, trained_size
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import copy_file, file_digest
from erasec.errors import ErasecError, require_modules
from erasec.graphs import link
from erasec.graphs.cache import GRAPHS_BYTES
from erasec.graphs.graph import MODEL
from erasec.graphs.manifest import MANIFEST, origin_of
from erasec.graphs.same import compare_folder, files_checks
from erasec.graphs.signature import FLUX, configs, graphs, input_shapes
from erasec.graphs.weights import digests
from erasec.model.sidecar import KINDS
from erasec.options import options
from erasec.progress import bar
from erasec.tensorrt import engines, patching
from erasec.tensorrt.engines import ENGINE, RECORD, RTX, Builder, Profile

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.graphs.signature import Configs, Graph
    from erasec.model.view import Model


UNREAD = "the weights inside engine files: engine.json and the sha256 of an engine only say what it was built from"
Range = tuple[int, int, int]  # the smallest, the usual and the largest size


@options
class EngineTarget(Target):
    """What both kinds of engines have in common.

    ``batch`` counts images, and ``height`` and ``width`` are in pixels: each is "smallest:usual:largest", or one number
    for a fixed size. By default sizes go from half of what the model was trained on to one and a half times that.
    ``workspace`` is in MiB, 0 for the library's own limit. ``precision`` is that of text encoders and denoiser, ``vae``
    that of the VAE. ``vae_encoder`` builds an engine of the VAE's encoder as well. ``onnx`` keeps the graphs that the
    engines are built from, in onnx/.
    """

    precision: Literal["fp32", "fp16"] = "fp16"
    vae: Literal["fp32", "fp16"] = "fp32"
    batch: str = "1:1:4"
    height: str = ""
    width: str = ""
    workspace: Annotated[int, Field(ge=0)] = 0
    vae_encoder: bool = False
    onnx: bool = False

    extras: ClassVar[frozenset[str]] = KINDS

    def __post_init__(self) -> None:
        for option in ("batch", "height", "width"):
            if text := getattr(self, option):
                parse_range(f"{self.name}: option {option}", text)

    def unread_reason(self) -> str:
        return UNREAD

    @abstractmethod
    def builder(self) -> Builder:
        """The library that builds the engines, and its settings."""

    def check(self) -> None:
        engines.require_library(self.builder().library)

    def size(self, model: Model) -> int:
        """The engines, and the graphs that they are built from, which are about as large.

        Raises ErasecError where the graphs do not cover the model, or it does not support the sizes of the options.
        """
        graphs(model.source)
        self.profiles(model.source)
        return super().size(model) * (1 if self.precision == "fp16" else 2)

    def cached(self, model: Model) -> int:
        return GRAPHS_BYTES

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, build an engine of each, one at a time, and check the engines.

        Raises ErasecError where the graphs do not cover the model, or the library cannot build an engine.
        """
        self.check()
        profiles, entries, library = self.profiles(checkpoint), dict[str, dict[str, Any]](), ""
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch, bar(self.name, len(profiles)) as advance:
            linked = Path(scratch) / "onnx"
            link.write_onnx(
                checkpoint, linked, self.precision, tuple(profiles), vae=self.vae, origin=origin_of(context)
            )
            for path in sorted(linked.rglob("*")):
                if path.is_file() and not path.name.startswith("model.") and path.name != MANIFEST:
                    copy_file(path, out / path.relative_to(linked))
            for name, profile in profiles.items():
                advance(0, name)
                entries[name], library = self.engine(linked / name / MODEL, out / name / ENGINE, profile)
                entries[name]["precision"] = self.vae if name.startswith("vae") else self.precision
                advance()
            engines.write_record(out, self.builder(), library, entries)
            checks = [check for name in profiles for check in engine_checks(out, name, linked / name / MODEL)]
            if self.onnx:
                os.replace(linked, out / "onnx")
        coarsest = "fp16" if "fp16" in (self.precision, self.vae) else "fp32"
        return Artifact(self.name, out, tuple(checks), coarsest)

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        """The files, and the checks of ``engine_checks`` with a limit, for which the graphs are linked again. Needs no
        GPU."""
        require_modules("comparing engines with their graphs", ("onnx",), "onnx")
        names = tuple(self.profiles(checkpoint))
        with tempfile.TemporaryDirectory(dir=process_scratch()) as scratch:
            linked = Path(scratch)
            link.write_onnx(checkpoint, linked, self.precision, names, vae=self.vae)
            others = {RECORD, *(f"{name}/{ENGINE}" for name in names)}
            checks = files_checks(self.name, checkpoint.root, linked, out, others, ("onnx/",) if self.onnx else ())
            if unlike := engines.read_record(out)["components"].keys() ^ names:
                how = f"engines that only one of {RECORD} and the target has"
                checks = *checks, Check.count(f"{self.name}/engines", sorted(unlike), how)
            if not all(check.passed for check in checks):
                return checks
            for name in names:
                checks += enforced(engine_checks(out, name, linked / name / MODEL, f"{name}/{ENGINE}"))
            return checks + (compare_folder("onnx", checkpoint.root, linked, out / "onnx") if self.onnx else ())

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        """Build one engine; returns its entry in engine.json, and the version of the library."""
        return engines.build_engine(graph, file, profile, self.builder())

    def profiles(self, checkpoint: Folder) -> dict[str, Profile]:
        """The range of input shapes that each engine is built for, by component.

        Raises ErasecError for a model that the graphs do not cover, or a size that the model does not support.
        """
        listed, by_component = graphs(checkpoint), configs(checkpoint)
        denoiser = next(graph.component for graph in listed if graph.denoises)
        step, scale = downscale(by_component[denoiser]), downscale(by_component["vae"])
        images = parse_range("batch", self.batch)
        sizes = {}
        for option, usual in zip(("height", "width"), trained_size(by_component[denoiser]), strict=True):
            smallest, largest = max(usual // 2 // step, 1) * step, -(-usual * 3 // 2 // step) * step
            text = getattr(self, option) or f"{scale * smallest}:{scale * usual}:{scale * largest}"
            pixels = parse_range(option, text)
            if wrong := [size for size in pixels if size % (scale * step)]:
                raise ErasecError(
                    f"{self.name}: option {option} has {wrong[0]}",
                    why=f"images of this model have a multiple of {scale * step} pixels",
                    fix=f"choose a multiple of {scale * step}",
                )
            sizes[option] = [size // scale for size in pixels]
        # Guidance runs the denoiser twice for each image, with its prompt and with the empty one; without it, once.
        # FLUX reads guidance as a number.
        guided = images[0], 2 * images[1], 2 * images[2]
        # A text encoder runs once for each different prompt, and all images may have the same one.
        encoded = 1, *guided[1:]
        return {
            graph.name: _profile(
                graph,
                by_component,
                encoded if graph.encodes_text else guided if graph.denoises and graph.kind != FLUX else images,
                sizes["height"],
                sizes["width"],
            )
            for graph in listed
            if graph.name != "vae_encoder" or self.vae_encoder
        }


def _profile(graph: Graph, configs: Configs, batches: Range, heights: Sequence[int], widths: Sequence[int]) -> Profile:
    """The smallest, usual and largest shape of each input of a graph; scalars have one shape and need no profile."""
    shapes = [input_shapes(graph, configs, *sizes) for sizes in zip(batches, heights, widths, strict=True)]
    return {key: [by_input[key] for by_input in shapes] for key, shape in shapes[0].items() if shape}


def parse_range(label: str, text: str) -> Range:
    """The smallest, usual and largest size from "1:2:4", or one fixed size from "2". Raises ErasecError."""
    parts = [part.strip() for part in text.split(":")]
    if len(parts) in (1, 3) and all(part.isdecimal() for part in parts):
        low, usual, high = map(int, parts * 3 if len(parts) == 1 else parts)
        if 0 < low <= usual <= high:
            return low, usual, high
    raise ErasecError(f"{label} is {text!r}", why='it takes three rising numbers "smallest:usual:largest", or one')


def enforced(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Those of the checks that have a limit."""
    return tuple(check for check in checks if check.limit is not None)


def engine_checks(folder: Path, name: str, graph: Path, path: str = "") -> tuple[Check, ...]:
    """Checks of one engine in a folder against the ONNX file that it should have been built from. ``path`` is where in
    the folder the engine must be; by default it may be anywhere."""
    record = engines.read_record(folder)
    entry, builder = record["components"][name], record["builder"]
    file, sources = engines.engine_file(folder, entry), dict(zip(("graph", "weights"), digests(graph), strict=True))
    differing = [kind for kind, digest in sources.items() if digest != entry[kind]]
    differing += ["file"] if path and entry["file"] != path else []
    if not file.is_file() or file_digest(file) != entry["engine"]:
        differing.append("engine")
    how = f"of the sha256 of graph, weights and engine, those that differ from {RECORD}"
    how += f": {', '.join(differing)}" if differing else ""
    library = f"{builder['name']} {builder['version']}"
    checks = [Check.at_most(f"engine/{name}/source", float(len(differing)), 0.0, how)]
    if name == "unet" and builder["name"] == RTX and file.is_file():
        checks.append(_text_check(file, graph, library))
    checks.append(Check.at_most(f"engine/{name}/MB", entry["bytes"] / 1e6, None, f"size of {entry['file']}"))
    checks.append(Check.at_most(f"engine/{name}/seconds", entry["seconds"], None, f"to build it, with {library}"))
    return tuple(checks)


def _text_check(file: Path, graph: Path, library: str) -> Check:
    """Count the matrices that project the text and that the engine does not hold byte for byte."""
    matrices = patching.text_projections(graph)
    missing = sorted(matrices.keys() - patching.locate(file, matrices).keys())
    how = f"of {len(matrices)} matrices that project the text, those that the engine does not hold byte for byte; "
    how += "keys times a scale"
    how += f"; the first is {missing[0]}" if missing else ""
    # An unknown version of the library may store them in another layout, in which none of them is found.
    enforced = library.split()[1].startswith(patching.KNOWN) or len(missing) < len(matrices)
    how += "" if enforced else f"; reported, not enforced, as the layout of {library} is unknown"
    return Check.at_most("engine/unet/text", float(len(missing)), 0.0 if enforced else None, how)
