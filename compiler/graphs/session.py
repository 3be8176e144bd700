"""A graph's file in ONNX Runtime: every session of erasec is opened here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


class OnnxSession:
    """One ONNX file in ONNX Runtime, on the CPU. ``threads`` 0 is the library's own number.

    With ``gpu``, it runs on a GPU where the installed ONNX Runtime has a CUDA provider. Without ``optimize``, its
    inputs and outputs are those of the file, and it loads faster. Raises whatever the library raises.
    """

    def __init__(self, file: Path, threads: int = 0, *, gpu: bool = False, optimize: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # the library raises its errors as well
        level = "ORT_ENABLE_ALL" if optimize else "ORT_DISABLE_ALL"
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        providers = ["CPUExecutionProvider"]
        if gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=providers)

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs by name for inputs by name: those called ``names``, by default all."""
        wanted = list(names) or [output.name for output in self.session.get_outputs()]
        return dict(zip(wanted, self.session.run(wanted, dict(inputs)), strict=True))

    def close(self) -> None:
        """The session holds nothing but memory, which goes with it."""
