"""Parity: an artifact computes the numbers of torch, and every way in which it can be another model fails a check."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import GRAPHS

from erasec.base import Check
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.graphs.export import graph_template
from erasec.graphs.link import BASE, EDITED, OPSET, write_onnx
from erasec.graphs.manifest import MANIFEST
from erasec.graphs.parity import (
    TOLERANCES,
    compare_graph,
    compare_outputs,
    compare_weights,
    load_module,
    relative_error,
)
from erasec.graphs.signature import Graph, graphs
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras
from erasec.runtime.backends import Function

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

KEY = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
Array = np.ndarray[Any, Any]


@pytest.fixture
def variant_a(variant: Callable[[str], Any]) -> Any:
    return variant("a")


@pytest.fixture
def damaged(variant_a: Any, tmp_path: Path) -> Path:
    """A copy of the ONNX folder for a test to damage."""
    return Path(shutil.copytree(variant_a.onnx, tmp_path / "damaged"))


def graph_named(folder: Path, name: str) -> Graph:
    return next(graph for graph in graphs(Folder(folder)) if graph.name == name)


def compare_one(checkpoint: Path, exported: Path, name: str, **options: Any) -> Check:
    """``compare_outputs`` of one graph."""
    return compare_graph(
        Folder(checkpoint), graph_named(checkpoint, name), exported, "fp32", 0, TOLERANCES["fp32"], **options
    )


def change(exported: Path, name: str, key: str, by: Callable[[Array], Array]) -> str:
    """Change a weight where it lies on disk; returns the name of the file."""
    model = onnx.load(exported / name / "model.onnx", load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.name.split(":")[0] == key)
    place = {item.key: item.value for item in tensor.external_data}
    file, offset = exported / name / place["location"], int(place["offset"])
    with file.open("r+b") as stream:
        stream.seek(offset)
        old = np.frombuffer(stream.read(int(place["length"])), np.float32).reshape(tuple(tensor.dims))
        stream.seek(offset)
        stream.write(np.ascontiguousarray(by(old), np.float32).tobytes())
    return str(place["location"])


def test_what_was_linked_is_the_checkpoint(variant_a: Any) -> None:
    checks = compare_weights(Folder(variant_a.folder), variant_a.onnx)
    assert [(check.name, check.passed, check.value) for check in checks] == [
        (f"weights/{name}", True, 0.0) for name in GRAPHS
    ]
    assert "of 326 (14 of them edited)" in checks[1].how
    check = compare_one(variant_a.folder, variant_a.onnx, "unet")
    assert check.passed and 0 < check.value < 2e-5
    assert "cases of seed 0: sample 2x4x8x8, 1x4x8x12, 3x4x16x8; timestep 0, 500, 981" in check.how


def negated(weight: Array) -> Array:
    return -weight


def turned(weight: Array) -> Array:
    """The matrix as it is stored, taken for its transpose: the same numbers in another order."""
    return weight.T.reshape(weight.shape)


@pytest.mark.parametrize("by", [negated, turned])
def test_a_changed_key_matrix_fails_and_is_named(variant_a: Any, damaged: Path, by: Callable[[Array], Array]) -> None:
    assert change(damaged, "unet", f"{KEY}.weight", by) == EDITED
    checks = compare_weights(Folder(variant_a.folder), damaged)
    assert [(check.name, check.value) for check in checks if not check.passed] == [("weights/unet", 1.0)]
    assert f"the first is {KEY}.weight" in checks[1].how
    check = compare_one(variant_a.folder, damaged, "unet")
    assert not check.passed
    assert TOLERANCES["fp32"] < check.value < float("inf")
    assert f"the first layer that differs is {KEY} (" in check.how


def test_a_tensor_that_was_left_unedited_fails_and_is_named(variant_a: Any, damaged: Path, random_folder: Path) -> None:
    unedited = load_module(Folder(random_folder), graph_named(random_folder, "unet")).get_submodule(KEY).weight
    change(damaged, "unet", f"{KEY}.weight", lambda old: unedited.detach().numpy().T.reshape(old.shape))
    checks = compare_weights(Folder(variant_a.folder), damaged)
    assert [(check.name, check.value) for check in checks if not check.passed] == [("weights/unet", 1.0)]
    assert f"the first is {KEY}.weight" in checks[1].how
    check = compare_one(variant_a.folder, damaged, "unet")
    assert not check.passed
    assert f"the first layer that differs is {KEY} (" in check.how


@pytest.mark.parametrize(
    ("name", "layer"), [("unet", "down_blocks.1.resnets.0.conv2"), ("vae_encoder", "encoder.conv_out")]
)
def test_a_damaged_convolution_is_named(variant_a: Any, damaged: Path, name: str, layer: str) -> None:
    assert change(damaged, name, f"{layer}.weight", lambda old: 1.1 * old) == BASE
    assert not next(
        check for check in compare_weights(Folder(variant_a.folder), damaged) if check.name == f"weights/{name}"
    ).passed
    check = compare_one(variant_a.folder, damaged, name)
    assert not check.passed
    assert f"the first layer that differs is {layer} (" in check.how


def test_a_nan_is_an_infinite_difference(variant_a: Any, damaged: Path) -> None:
    change(damaged, "vae_decoder", "decoder.conv_in.bias", lambda old: np.full_like(old, np.nan))
    check = compare_one(variant_a.folder, damaged, "vae_decoder")
    assert (check.passed, check.value) == (False, float("inf"))


def test_an_artifact_of_another_edit_fails_both(variant: Callable[[str], Any]) -> None:
    a, b = variant("a"), variant("b")
    assert [check.value for check in compare_weights(Folder(b.folder), a.onnx)] == [0.0, 14.0, 0.0, 0.0]
    assert not compare_one(b.folder, a.onnx, "unet").passed


def test_a_graph_of_another_configuration_under_the_same_key_fails(
    base: Path, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    file = base / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "norm_num_groups": config["norm_num_groups"] // 2}))
    right, stale = (
        graph_template(Folder(folder), graph_named(folder, "vae_encoder"), "fp32", OPSET)
        for folder in (random_folder, base)
    )
    shutil.rmtree(right.root)
    shutil.move(stale.root, right.root)
    write_onnx(Folder(random_folder), tmp_path / "onnx", names=("vae_encoder",))
    (same,) = compare_weights(Folder(random_folder), tmp_path / "onnx")
    assert same.passed  # each tensor is there, and is read as another model would
    (check,) = compare_outputs(Folder(random_folder), tmp_path / "onnx")
    assert not check.passed
    assert "the first layer that differs is encoder.down_blocks.0.resnets.0.norm1" in check.how


def test_missing_and_damaged_files_fail(variant_a: Any, damaged: Path) -> None:
    os.truncate(damaged / "unet" / EDITED, 100)
    (damaged / "vae_decoder" / BASE).unlink()
    (damaged / "vae_encoder" / "model.onnx").write_bytes(b"\xff" * 100)
    assert [check.passed for check in compare_weights(Folder(variant_a.folder), damaged)] == [True, False, False, False]


def test_a_file_that_cannot_be_loaded_fails_with_its_name(variant_a: Any, damaged: Path) -> None:
    file = damaged / "vae_decoder" / "model.onnx"
    file.write_bytes(file.read_bytes()[:5000])
    for _ in range(2):
        check = compare_one(variant_a.folder, damaged, "vae_decoder")
        assert (check.passed, check.value) == (False, float("inf"))
        assert "vae_decoder/model.onnx" in check.how
        assert str(damaged) not in check.how
        file.unlink(missing_ok=True)


def test_a_graph_with_a_frozen_size_fails(variant_a: Any, damaged: Path) -> None:
    module = load_module(Folder(variant_a.folder), graph_named(variant_a.folder, "vae_encoder"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(2, 3, 64, 64),),
            str(damaged / "vae_encoder" / "model.onnx"),
            dynamo=False,
            input_names=["sample"],
            output_names=["latent_parameters"],
        )
    assert not compare_one(variant_a.folder, damaged, "vae_encoder").passed


def test_another_runtime_can_take_the_place_of_onnxruntime(variant_a: Any) -> None:
    graph, loaded, runs = graph_named(variant_a.folder, "vae_encoder"), list[str](), list[str]()
    module = load_module(Folder(variant_a.folder), graph)

    def loader(factor: float) -> Callable[[Graph], Function]:
        def load(graph: Graph) -> Function:
            loaded.append(graph.name)

            def run(inputs: Any) -> dict[str, Array]:
                runs.append(graph.name)
                (images,) = (torch.from_numpy(inputs[name]) for name in graph.inputs)
                with torch.no_grad():
                    output = module(images).numpy()
                return {"latent_parameters": output if factor == 1 else factor * output}

            return Function(run)

        return load

    good, bad = (
        compare_one(variant_a.folder, variant_a.onnx, "vae_encoder", load=loader(f), runtime="mine") for f in (1, 1.01)
    )
    assert (good.passed, good.value) == (True, 0.0)
    assert not bad.passed
    assert bad.value == pytest.approx(0.01, rel=1e-3)
    assert "max |mine - torch|" in bad.how
    assert loaded == ["vae_encoder"] * 2
    assert runs == ["vae_encoder"] * 6


def test_each_precision_has_its_tolerance(random_folder: Path, tmp_path: Path) -> None:
    write_onnx(Folder(random_folder), tmp_path / "onnx", "fp16", ("text_encoder",))
    (check,) = compare_outputs(Folder(random_folder), tmp_path / "onnx")
    assert check.passed
    assert check.limit == TOLERANCES["fp16"]
    assert "fp16 against float32" in check.how
    (strict,) = compare_outputs(Folder(random_folder), tmp_path / "onnx", tolerances={"fp16": TOLERANCES["fp32"]})
    assert not strict.passed


@pytest.mark.parametrize(
    ("output", "answer", "wanted"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.1], [0.0, 0.0], float("inf")),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, 2.0], [1.0, float("inf")], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_the_difference_is_relative_to_the_largest_number(
    output: list[float], answer: list[float], wanted: float
) -> None:
    assert relative_error(np.array(output, np.float32), np.array(answer, np.float32)) == wanted


def test_a_missing_tensor_is_an_error(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"conv_out.bias"', b'"conv_oup.bias"', 1))
    with pytest.raises(ErasecError, match=r"unet has no conv_out\.bias"):
        load_module(Folder(base), graph_named(base, "unet"))


def test_a_schedule_of_another_length_moves_the_gate(base: Path) -> None:
    place, rows = "up_blocks.2.attentions.1.transformer_blocks.0.attn2", torch.ones(4, 64)
    write_extras(base, Extras((Memory(place, rows, rows, "side", until=0.7),)))
    file = base / "scheduler" / "scheduler_config.json"
    starts = []
    for steps in (1000, 100):
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": steps}))
        starts.append(load_module(Folder(base), graph_named(base, "unet")).get_submodule(place).processor.side[0].start)
    assert starts == [300, 30]


def test_only_graphs_of_the_manifest_are_compared(variant_a: Any, damaged: Path) -> None:
    manifest = json.loads((damaged / MANIFEST).read_text())
    del manifest["graphs"]["unet"], manifest["graphs"]["vae_decoder"], manifest["graphs"]["vae_encoder"]
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    assert [check.name for check in compare_outputs(Folder(variant_a.folder), damaged)] == ["parity/text_encoder"]
    assert [check.name for check in compare_weights(Folder(variant_a.folder), damaged)] == ["weights/text_encoder"]
