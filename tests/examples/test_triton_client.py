"""The client of a Triton server makes the images of `erasec run`; onnxruntime stands in for the server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_models import TEXT_TO_IMAGE

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.graphs.link import write_onnx
from erasec.runtime.bundle import open_bundle
from erasec.targets import triton
from erasec.targets.triton import Triton, parse_config

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


class InferInput:
    """As in tritonclient.http: it has a shape and a type, and takes an array of these."""

    def __init__(self, name: str, shape: list[int], datatype: str) -> None:
        self.name, self.shape, self.datatype = name, shape, datatype

    def set_data_from_numpy(self, array: Any) -> None:
        assert (list(array.shape), datatype(array.dtype)) == (self.shape, self.datatype)
        self.array = array


class Result:
    def __init__(self, outputs: dict[str, Any]) -> None:
        self.outputs = outputs

    def get_response(self) -> dict[str, Any]:
        return {"outputs": [{"name": name} for name in self.outputs]}

    def as_numpy(self, name: str) -> Any:
        return self.outputs[name]


class InferenceServerClient:
    """Serves a repository by its configurations, and refuses inputs that they do not allow."""

    models: Path
    requested: list[str]

    def __init__(self, url: str, **options: float) -> None:
        assert url == "localhost:8000"

    def infer(self, name: str, inputs: list[InferInput]) -> Result:
        self.requested.append(name)
        fields = parse_config((self.models / name / "config.pbtxt").read_text())
        ports = {port["name"][0]: (port["data_type"][0], port["dims"][0]) for port in fields["input"]}
        assert ports.keys() == {given.name for given in inputs}
        for given in inputs:
            kind, dims = ports[given.name]
            assert kind == f"TYPE_{given.datatype}"
            assert len(dims) == len(given.shape)
            assert all(dim in (-1, size) for dim, size in zip(dims, given.shape, strict=True))
        (version,) = fields["version_policy"][0]["specific"][0]["versions"][0]
        session = onnxruntime.InferenceSession(self.models / name / str(version) / "model.onnx")
        names = [output.name for output in session.get_outputs()]
        return Result(dict(zip(names, session.run(names, {each.name: each.array for each in inputs}), strict=True)))


def datatype(dtype: Any) -> str:
    return {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}[np.dtype(dtype)]


@pytest.fixture
def client(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, with the library that it imports in its place."""
    names = ("tritonclient", "tritonclient.http", "tritonclient.utils")
    library, http, utils = (ModuleType(name) for name in names)
    vars(http).update(InferInput=InferInput, InferenceServerClient=InferenceServerClient)
    vars(utils).update(np_to_triton_dtype=datatype)
    vars(library).update(http=http, utils=utils)
    for name, module in zip(names, (library, http, utils), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("triton_client", root / "examples" / "triton_client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_of_erasec_run(
    client: ModuleType, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(triton, "compare_weights", lambda *_: ())
    monkeypatch.setattr(triton, "compare_outputs", lambda *_: ())
    (tmp_path / "triton").mkdir()
    Triton(version=3).export(Folder(random_folder), tmp_path / "triton", Context())
    monkeypatch.setattr(InferenceServerClient, "models", tmp_path / "triton" / "models", raising=False)
    monkeypatch.setattr(InferenceServerClient, "requested", [], raising=False)
    out = tmp_path / "x.png"
    options = ["--prompt", "a red star", "--steps", "2", "--seed", "5", "--count", "2", "--out", str(out)]
    client.main([str(tmp_path / "triton" / "client"), *options])
    paths = [out.with_name(f"x-{number}.png") for number in range(2)]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert InferenceServerClient.requested == ["text_encoder", "unet", "unet", "vae_decoder"]
    images = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
    write_onnx(Folder(random_folder), tmp_path / "onnx", names=TEXT_TO_IMAGE)
    bundle = open_bundle(tmp_path / "onnx", threads=1)
    wanted = bundle.generate(["a red star"] * 2, [5, 6], 2).astype(int)
    assert np.abs(images - wanted).max() <= 1
    assert np.abs(images - bundle.generate(["a red star"] * 2, [6, 7], 2).astype(int)).max() > 10
