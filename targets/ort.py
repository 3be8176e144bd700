"""Target onnx: the four graphs of Stable Diffusion in the layout that ORTStableDiffusionPipeline.from_pretrained reads.

Graphs are traced once for a configuration and kept; a checkpoint is linked to them. ``parity`` looks for what a tracer
can get wrong, sizes and steps frozen into the graph, and ``tensors`` for what a linker can.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Context, Target, require
from erasec.errors import ErasecError, nearest
from erasec.graphs import link as linker
from erasec.graphs.graph import PRECISIONS, graphs
from erasec.graphs.parity import TOLERANCES, parity, tensors
from erasec.model import sidecar as extras

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model

BYTES = {"fp32": 4, "fp16": 2}
OPSETS = range(17, 21)  # from LayerNormalization to the last that the exporter knows


@dataclass(frozen=True)
class Onnx(Target):
    """Graphs with dynamic batch and size. Heights and widths of latents are multiples of what the UNet halves them by
    (8 for Stable Diffusion), as in every export of it. Inputs and outputs are float32.

    ``precision`` "fp16" has weights and computation of text encoder and UNet in float16, but for the modules that
    ``islands`` names, patterns joined by "+"; ``vae`` is the VAE's precision, which float16 can fill with NaN.
    ``tolerance`` of parity, 0 for the precision's own. ``base`` is an earlier ONNX folder of the same base whose
    unedited data are linked hard and not written.
    """

    opset: int = linker.OPSET
    precision: str = "fp32"
    vae: str = "fp32"
    islands: str = "+".join(linker.ISLANDS)
    tolerance: float = 0.0
    base: str = ""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX graphs for onnxruntime, in the layout of ORTStableDiffusionPipeline"
    holds: ClassVar[frozenset[str]] = extras.KINDS

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ErasecError(f"onnx: opset {self.opset} cannot be written", why=f"{OPSETS[0]} to {OPSETS[-1]} can")
        if self.tolerance < 0:
            raise ErasecError(f"onnx: tolerance is {self.tolerance}", why="it must be 0 or above")
        for option in ("precision", "vae"):
            if (given := getattr(self, option)) not in PRECISIONS:
                raise ErasecError(f"onnx: option {option} is {given!r}", why=nearest(given, PRECISIONS))

    def check(self) -> None:
        require("the target onnx", ("onnx", "onnxruntime"), "onnx")
        if self.base:
            told = linker.read_manifest(Path(self.base).expanduser())
            if (found := (told["precision"], told["vae"])) != (self.precision, self.vae):
                raise ErasecError(
                    f"onnx: the data of {self.base} cannot be shared", why=f"its precision is {', vae='.join(found)}",
                    fix="ask for the same precision, or leave out the option base",
                )  # fmt: skip

    def size(self, model: Model) -> int:
        """All weights in their precision; islands and what is shared with ``base`` are not told apart.

        Raises ErasecError for a model that the graphs do not cover, so that it is told before anything is solved.
        """
        graphs(model.source)
        width = {name: BYTES[self.vae if name == "vae" else self.precision] for name in model.family.components}
        return sum(width[name] * prod(each.shape) for name in width for each in model.source.entries(name).values())

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link all graphs, then check each against torch. Raises ErasecError where a component is of another kind."""
        self.check()
        linker.write(
            checkpoint, out, self.precision, vae=self.vae, islands=tuple(filter(None, self.islands.split("+"))),
            opset=self.opset, origin=context.origin, share=Path(self.base).expanduser() if self.base else None,
        )  # fmt: skip
        own = dict.fromkeys(PRECISIONS, self.tolerance) if self.tolerance else TOLERANCES
        checks = tensors(checkpoint, out) + parity(checkpoint, out, seed=context.seed, tolerances=own)
        return Artifact(self.name, out, checks)
