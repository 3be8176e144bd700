"""Target onnx: the graphs of a model in the layout that the ONNX pipelines of optimum read.

Graphs are traced once for a configuration and cached; then a checkpoint's weights are linked to them.
``compare_outputs`` detects errors of tracing, such as a size or a timestep that became a constant of the graph, and
``compare_weights`` errors of linking.
"""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.owned import process_scratch
from erasec.errors import ErasecError, require_modules
from erasec.graphs.cache import GRAPHS_BYTES
from erasec.graphs.link import KEEP_IN_FP32, OPSET, write_onnx
from erasec.graphs.manifest import origin_of, read_manifest
from erasec.graphs.parity import TOLERANCES, compare_outputs, compare_weights
from erasec.graphs.same import compare_folder
from erasec.graphs.signature import PRECISIONS, graphs
from erasec.model.sidecar import KINDS
from erasec.options import options
from erasec.runtime.schedulers import sampling_notes

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.graphs.manifest import Origin
    from erasec.model.view import Model

BYTES = {"fp32": 4, "fp16": 2}


@options
class Onnx(Target):
    """Graphs with dynamic batch and size; inputs and outputs are float32. Heights and widths of latents are multiples
    of the denoiser's downscaling (8 for Stable Diffusion 1, 2 for transformers), as in every export of it.

    ``opset`` is ONNX's version of the operators. ``precision`` "fp16" stores and computes text encoders and denoiser in
    float16, except modules whose names match ``keep_in_fp32``, patterns joined by "+". ``vae`` is the precision of the
    VAE, which may overflow in float16. ``tolerance`` is that of parity, 0 for the default of the precision. ``base`` is
    an ONNX folder of another edit of the same base: data of unedited tensors are hard-linked from it instead of
    written.
    """

    opset: Annotated[int, Field(ge=17, le=20)] = OPSET
    precision: Literal["fp32", "fp16"] = "fp32"
    vae: Literal["fp32", "fp16"] = "fp32"
    keep_in_fp32: str = "+".join(KEEP_IN_FP32)
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    base: str = ""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX graphs for onnxruntime, in the layout of optimum's ONNX pipelines"
    extras: ClassVar[frozenset[str]] = KINDS
    renamed: ClassVar[dict[str, str]] = {"islands": "keep_in_fp32"}

    def check(self) -> None:
        """Raise MissingTool where a library is missing, ErasecError where the folder ``base`` has another precision."""
        require_modules("the target onnx", ("onnx", "onnxruntime"), "onnx")
        if self.base:
            manifest = read_manifest(Path(self.base).expanduser())
            if (shared := (manifest["precision"], manifest["vae"])) != (self.precision, self.vae):
                raise ErasecError(
                    f"onnx: the data of {self.base} cannot be shared",
                    why=f"its precision is {', vae='.join(shared)}",
                    fix="choose the same precision, or leave out the option base",
                )

    def size(self, model: Model) -> int:
        """All weights in their precision, as if none were kept in float32 or shared with ``base``.

        Raises ErasecError for a model that the graphs do not cover, so that ``erasec plan`` reports it.
        """
        graphs(model.source)
        width = {name: BYTES[self.vae if name == "vae" else self.precision] for name in model.family.components}
        return sum(width[name] * prod(entry.shape) for name in width for entry in model.source.entries(name).values())

    def cached(self, model: Model) -> int:
        return GRAPHS_BYTES

    def notes(self, model: Model) -> tuple[str, ...]:
        return sampling_notes(self.name, model.source)

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link all graphs, then compare each with the checkpoint and with torch.

        Raises ErasecError for a model that the graphs do not cover.
        """
        self.check()
        self._link(checkpoint, out, origin_of(context), Path(self.base).expanduser() if self.base else None)
        limits = dict.fromkeys(PRECISIONS, self.tolerance) if self.tolerance else TOLERANCES
        weights = compare_weights(checkpoint, out)
        outputs = compare_outputs(checkpoint, out, seed=context.seed, tolerances=limits)
        coarsest = "fp16" if "fp16" in (self.precision, self.vae) else "fp32"
        return Artifact(self.name, out, weights + outputs, coarsest)

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        """The graphs are linked again, and all files are compared with them."""
        require_modules("comparing ONNX graphs", ("onnx",), "onnx")
        with tempfile.TemporaryDirectory(dir=process_scratch()) as scratch:
            self._link(checkpoint, Path(scratch))
            return compare_folder(self.name, checkpoint.root, Path(scratch), out)

    def _link(self, checkpoint: Folder, out: Path, origin: Origin | None = None, share: Path | None = None) -> None:
        write_onnx(
            checkpoint,
            out,
            self.precision,
            vae=self.vae,
            keep_in_fp32=tuple(filter(None, self.keep_in_fp32.split("+"))),
            opset=self.opset,
            origin=origin,
            share=share,
        )
