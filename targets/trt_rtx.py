"""Target trt-rtx: TensorRT-RTX engines, built ahead of time on any machine, with or without a GPU.

Without a GPU, a build checks that every engine was built from this graph and these weights, that the file is the one
that was built, and that it holds the matrices that project the text, which most erasures change, byte for byte. The
outputs of engines are checked on a machine with a GPU, by ``erasec check``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from erasec.errors import ErasecError
from erasec.options import options
from erasec.runtime.schedulers import sampling_notes
from erasec.tensorrt import engines, patching
from erasec.tensorrt.base import EngineTarget
from erasec.tensorrt.engines import RTX, Builder, Profile

if TYPE_CHECKING:
    from erasec.model.view import Model


@options
class TrtRtx(EngineTarget):
    """``capabilities`` are the compute capabilities to build for, such as "80+89"; by default 8.0 and all later ones.
    ``patch`` writes an edit into a cached engine where that is proven to give the engine that a build would give."""

    capabilities: str = ""
    patch: bool = False

    name: ClassVar[str] = "trt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX engines, built ahead of time with or without a GPU"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.builder().capabilities if name not in engines.CAPABILITIES]:
            raise ErasecError(
                f"trt-rtx: option capabilities has {unknown[0]!r}",
                why=f"it takes {', '.join(engines.CAPABILITIES)}",
                fix='join several by "+": capabilities="80+89"',
            )

    def builder(self) -> Builder:
        return Builder(RTX, tuple(self.capabilities.split("+")) if self.capabilities else (), self.workspace)

    def cached(self, model: Model) -> int:
        return super().cached(model) + (self.size(model) if self.patch else 0)

    def notes(self, model: Model) -> tuple[str, ...]:
        return sampling_notes(self.name, model.source)

    def engine(self, graph: Path, file: Path, profile: Profile) -> tuple[dict[str, Any], str]:
        if self.patch and graph.parent.name == "unet":
            return patching.patched_engine(graph, file, profile, self.builder())
        return super().engine(graph, file, profile)
