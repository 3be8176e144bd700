"""Sessions of ONNX Runtime: outputs by name, all or some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from erasec.graphs.session import OnnxSession

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """y = x + x and z = x * x."""
    from onnx import helper

    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Mul", ["x", "x"], ["z"])]
    infos = [helper.make_tensor_value_info(name, 1, ["n"]) for name in ("x", "y", "z")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx"
    )
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("optimize", [True, False])
def test_outputs_are_returned_by_name(file: Path, optimize: bool) -> None:
    session = OnnxSession(file, 1, optimize=optimize)
    x = np.array([1, 2, 3], np.float32)
    outputs = session.run({"x": x})
    assert {name: value.tolist() for name, value in outputs.items()} == {"y": [2, 4, 6], "z": [1, 4, 9]}
    assert list(session.run({"x": x}, ["z"])) == ["z"]


def test_only_with_gpu_other_providers_are_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    requested: list[list[str]] = []
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda file, options, providers: requested.append(providers) or object()
    )
    OnnxSession(file)
    OnnxSession(file, gpu=True)
    assert requested == [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]]
