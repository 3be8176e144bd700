"""Runtimes: their components take and return the same arrays, and errors name what is missing or damaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erasec.checkpoint.folder import EXTRAS_FILE
from erasec.errors import ErasecError, MissingTool
from erasec.model.sidecar import Extras, write_extras
from erasec.runtime import backends
from erasec.runtime.bundle import Bundle, open_bundle

PROMPTS = ("a red star", "", "a blue circle", "two green rings")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the ONNX folder for a test to damage."""
    return Path(shutil.copytree(built / "onnx", tmp_path / "onnx"))


def failure(folder: Path) -> str:
    with pytest.raises(ErasecError) as caught:
        open_bundle(folder, threads=1).generate(["a star"], [0], 2)
    return str(caught.value)


def test_a_component_takes_and_returns_the_same_in_every_runtime(built: Path, opened: Bundle) -> None:
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    inputs_of = {"text_encoder": {"input_ids": opened.components.ids(PROMPTS)}, "vae_encoder": {"sample": pixels}}
    other = open_bundle(built, "torch", threads=1)
    for component, inputs in inputs_of.items():
        ours, theirs = opened.run(component, inputs), other.run(component, inputs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.abs(ours[name] - theirs[name]).max() < 1e-4 * np.abs(theirs[name]).max()


def test_scalar_inputs_become_vectors_of_one_number() -> None:
    class Echo:
        closed = False

        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return dict(inputs)

        def close(self) -> None:
            self.closed = True

    inner = Echo()
    component = backends.with_vectors(inner)
    outputs = component.run({"timestep": np.array(5.0), "sample": np.ones((2, 3))})
    assert {name: value.shape for name, value in outputs.items()} == {"timestep": (1,), "sample": (2, 3)}
    component.close()
    assert inner.closed


def test_a_graph_that_is_damaged_or_missing(folder: Path) -> None:
    graph = folder / "text_encoder" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    assert "text_encoder/model.onnx cannot be loaded" in failure(folder)
    graph.unlink()
    assert "the bundle has no text_encoder/model.onnx" in failure(folder)


def test_tokens_that_the_tokenizer_does_not_know(folder: Path) -> None:
    row = torch.zeros(128)
    write_extras(folder, Extras((), {"<new>": row}))
    assert "does not know the new token '<new>'" in failure(folder)
    write_extras(folder, Extras((), {"star</w>": row}))
    assert open_bundle(folder).components.ids(["a star"]).shape == (1, 77)


def test_extras_that_are_damaged(folder: Path) -> None:
    write_extras(folder, Extras((), {}, "blood"))
    assert backends.carried_text(folder) == ("blood", [])
    path = folder / EXTRAS_FILE
    path.write_bytes(path.read_bytes().replace(b"erasec.extras", b"erasec.extraz"))
    assert f"{EXTRAS_FILE} is damaged" in failure(folder)


@pytest.mark.parametrize(("backend", "library", "extra"), [("ort", "onnxruntime", "onnx"), ("openvino",) * 3])
def test_a_library_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str, library: str, extra: str
) -> None:
    for graph in folder.glob("*/model.onnx"):
        graph.with_name("openvino_model.xml").touch()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingTool) as caught:
        open_bundle(folder, backend).generate(["a star"], [0], 2)
    assert library in caught.value.what and caught.value.fix == f'pip install "erasec[{extra}]"'
