"""Target openvino: layout, ports, every weight bit by bit, parity with torch, and damage that the checks must find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import GRAPHS

from erasec.base import Artifact, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import patch_file, read_tensor
from erasec.errors import TOOL_MISSING, ErasecError, MissingTool
from erasec.graphs.link import write_onnx
from erasec.graphs.parity import TOLERANCES
from erasec.graphs.signature import Graph, graphs
from erasec.model.loading import load
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras
from erasec.runtime import backends
from erasec.targets.ov import (
    BYTES,
    FILE,
    OpenVino,
    compare_outputs,
    compare_ports,
    compare_weights,
    convert,
    quantized,
)

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnx")

TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def exported(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return OpenVino().export(Folder(random_folder), tmp_path_factory.mktemp("ir"), Context())


@pytest.fixture(scope="module")
def linked(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder that is converted."""
    folder = tmp_path_factory.mktemp("linked")
    write_onnx(Folder(random_folder), folder)
    return folder


@pytest.fixture
def damaged(exported: Artifact, tmp_path: Path) -> Path:
    """A copy of the export for a test to damage."""
    return Path(shutil.copytree(exported.path, tmp_path / "damaged"))


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))


def test_a_folder_is_compared_with_its_checkpoint_and_with_another(exported: Artifact, base: Path) -> None:
    """As ``erasec verify`` does, which has neither the graphs nor the edit."""
    assert {check.passed for check in OpenVino().compare(Folder(base), exported.path)} == {True}
    (file,) = Folder(base).weight_files("unet")
    edited = read_tensor(Folder(base).entries("unet")[TO_K]) * 1.5
    patch_file(file, file, {TO_K: lambda: edited})
    failed = [check for check in OpenVino().compare(Folder(base), exported.path) if not check.passed]
    assert [check.name for check in failed] == ["weights/unet"] and TO_K in failed[0].how


def with_constant(folder: Path, side: int) -> None:
    """Add a constant that no weight of the graph is to the IR in ``folder``; its output becomes that much larger."""
    from openvino import opset13 as ops

    model = openvino.Core().read_model(folder / FILE)
    result = model.get_results()[0].input(0)
    old = ops.constant(np.full((side, side), 2.0, np.float32), name="old")
    moved = ops.add(result.get_source_output(), ops.reduce_sum(old, ops.constant([0, 1])))
    moved.output(0).get_tensor().set_names(result.get_source_output().get_names())
    result.replace_source_output(moved.output(0))
    openvino.save_model(model, folder / "new.xml", compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        (folder / "new").with_suffix(suffix).replace((folder / FILE).with_suffix(suffix))


@pytest.mark.parametrize(("side", "limit", "passed"), [(200, 0.0, False), (2, None, True)])
def test_constants_that_are_no_weights_are_wrong_or_not_compared(
    damaged: Path, random_folder: Path, side: int, limit: float | None, passed: bool
) -> None:
    """A small one may be of another version of the library: then it is stated that the graph was not compared."""
    with_constant(damaged / "vae_decoder", side)
    checks = {check.name: check for check in OpenVino().compare(Folder(random_folder), damaged)}
    check = checks.pop("graph/vae_decoder")
    assert (check.limit, check.passed) == (limit, passed) and ("old" in check.how) != passed
    assert all(check.passed and check.limit == 0 for check in checks.values())


def test_a_file_that_is_not_of_the_target_is_wrong(damaged: Path, random_folder: Path) -> None:
    (damaged / "unet" / "more.bin").touch()
    (check,) = OpenVino().compare(Folder(random_folder), damaged)
    assert check.name == "openvino/files" and not check.passed and "unet/more.bin" in check.how


def only(folder: Path, name: str) -> tuple[Graph, ...]:
    return tuple(graph for graph in graphs(Folder(folder)) if graph.name == name)


def rebuilt(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a model on disk; it lies in memory while it is written."""
    model = openvino.Core().read_model(file.read_bytes(), file.with_suffix(".bin").read_bytes())
    openvino.save_model(change(model) or model, file, compress_to_fp16=False)


def test_the_layout_is_the_one_that_pipelines_read(exported: Artifact, random_folder: Path) -> None:
    paths = {name.as_posix() for name in Folder(exported.path).files()}
    copied = {"model_index.json", "scheduler/scheduler_config.json"}
    copied |= {f"tokenizer/{path.name}" for path in (random_folder / "tokenizer").iterdir()}
    written = {f"{name}/{file}" for name in GRAPHS for file in (FILE, "openvino_model.bin", "config.json")}
    assert paths == copied | written
    assert sorted(path.name for path in exported.path.rglob(".*")) == []
    for name in copied:
        assert (exported.path / name).read_bytes() == (random_folder / name).read_bytes()


def test_all_checks_pass_on_what_was_exported(exported: Artifact) -> None:
    names = [f"{kind}/{name}" for kind in ("weights", "parity") for name in GRAPHS]
    assert [check.name for check in exported.checks] == ["openvino/ports", *names]
    assert all(check.passed for check in exported.checks)
    assert all(0 < check.value < 2e-5 for check in exported.checks if check.name.startswith("parity"))
    assert "of 11 inputs" in exported.checks[0].how
    assert "of 326" in exported.checks[2].how
    assert "max |openvino - torch|" in exported.checks[-1].how


def test_the_plan_counts_the_graphs_as_well(random_folder: Path) -> None:
    model = load(str(random_folder))
    whole = sum(path.stat().st_size for path in random_folder.rglob("*.safetensors")) * 2  # which is in float16
    for kind, share in {"fp32": 2.0, "fp16": 1.5, "int8": 1.25}.items():
        assert OpenVino(weights=kind).size(model) == pytest.approx(share * whole, rel=0.02)


def test_sizes_are_dynamic_and_all_numbers_float32(exported: Artifact) -> None:
    core = openvino.Core()
    unet = core.compile_model(exported.path / "unet" / FILE, "CPU", backends.OpenVino.EXACT)
    rng = np.random.default_rng(0)
    for batch, height, width, tokens in ((5, 4, 12, 77), (1, 8, 4, 3)):
        sample = rng.standard_normal((batch, 4, height, width), np.float32)
        states = rng.standard_normal((batch, tokens, 128), np.float32)
        (out,) = unet({"sample": sample, "timestep": np.float32(12.5), "encoder_hidden_states": states}).values()
        assert (out.shape, out.dtype) == ((batch, 4, height, width), np.float32)


def test_the_same_graph_gives_the_same_bytes_and_half_of_them_in_float16(linked: Path, tmp_path: Path) -> None:
    for kind in BYTES:
        (tmp_path / kind).mkdir()
        for name in ("one", "two"):
            convert(linked / "text_encoder" / "model.onnx", tmp_path / kind / f"{name}.xml", kind)
        for suffix in (".xml", ".bin"):
            assert (tmp_path / kind / f"one{suffix}").read_bytes() == (tmp_path / kind / f"two{suffix}").read_bytes()
    sizes = [(tmp_path / kind / "one.bin").stat().st_size for kind in ("fp16", "fp32")]
    assert sizes[0] < 0.51 * sizes[1]
    assert str(linked) not in (tmp_path / "fp32" / "one.xml").read_text()


def test_float16_is_the_rounded_checkpoint_and_nothing_else(random_folder: Path, linked: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(random_folder, tmp_path / "base"))
    (file,) = Folder(base).weight_files("text_encoder")
    key = next(key for key in Folder(base).entries("text_encoder") if key.endswith("layers.0.mlp.fc1.bias"))
    selected = only(base, "text_encoder")
    (tmp_path / "ir" / "text_encoder").mkdir(parents=True)
    convert(linked / "text_encoder" / "model.onnx", tmp_path / "ir" / "text_encoder" / FILE, "fp16")
    (check,) = compare_weights(Folder(base), linked, tmp_path / "ir", selected, "fp16")
    assert check.passed
    assert "rounded" in check.how
    (check,) = compare_outputs(Folder(base), tmp_path / "ir", selected)
    assert check.passed  # the checkpoint is in float16, so that nothing is lost, nor in constants that are no weights
    (check,) = compare_weights(Folder(base), linked, tmp_path / "ir", selected, "fp32")
    assert (check.passed, check.value) == (False, 68)
    moved = read_tensor(Folder(base).entries("text_encoder")[key])
    moved[0] += 0.01
    patch_file(file, file, {key: lambda: moved})
    (check,) = compare_weights(Folder(base), linked, tmp_path / "ir", selected, "fp16")
    assert (check.passed, check.value) == (False, 1)
    assert check.how.endswith("fc1.bias")


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder"])
def test_bytes_are_the_levels_of_the_checkpoint(random_folder: Path, linked: Path, tmp_path: Path, name: str) -> None:
    """Embeddings and linear layers in the one, convolutions in the other."""
    selected = only(random_folder, name)
    file = tmp_path / name / FILE
    file.parent.mkdir()
    convert(linked / name / "model.onnx", file, "int8")
    exact = sum(entry.stop - entry.start for entry in Folder(random_folder).entries(selected[0].component).values())
    assert name == "vae_encoder" or file.with_suffix(".bin").stat().st_size < 0.53 * exact  # which is in float16
    (check,) = compare_weights(Folder(random_folder), linked, tmp_path, selected, "int8")
    assert check.passed
    assert "in 256 levels" in check.how
    (check,) = compare_outputs(Folder(random_folder), tmp_path, selected, "int8")
    assert check.passed
    assert check.value > TOLERANCES["fp32"]
    data = bytearray(file.with_suffix(".bin").read_bytes())
    largest = max(openvino.Core().read_model(file).get_ordered_ops(), key=lambda node: _bytes(node))
    at = data.find(largest.data.tobytes())
    data[at] ^= 1
    del largest
    file.with_suffix(".bin").write_bytes(data)
    (check,) = compare_weights(Folder(random_folder), linked, tmp_path, selected, "int8")
    assert (check.passed, check.value) == (False, 1)


def _bytes(node: Any) -> int:
    return int(node.data.nbytes) if node.get_type_name() == "Constant" else 0


def test_levels_are_within_half_a_step_and_zero_stays_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 5, 2), np.float32)
    weight[0] = 0
    weight[1] = np.abs(weight[1])
    weight[:, 3] = 0
    for axis in range(3):
        levels, zero, scale = quantized(weight, axis)
        assert (levels.dtype, zero.dtype, scale.dtype) == (np.uint8, np.uint8, np.float32)
        assert scale.size == weight.shape[axis]
        again = (levels.astype(np.float32) - zero) * scale
        assert np.all(np.abs(again - weight) <= 0.5001 * scale)
        assert np.all(again[weight == 0] == 0)
    coarse = np.abs(again - weight).max()
    assert coarse > 1e-4  # or this would say nothing


def test_one_tensor_left_unedited_fails(random_folder: Path, base: Path, linked: Path, exported: Artifact) -> None:
    """The folder of the base beside a checkpoint in which one cross-attention was edited."""
    (file,) = Folder(base).weight_files("unet")
    edited = read_tensor(Folder(base).entries("unet")[TO_K]) * 1.5
    patch_file(file, file, {TO_K: lambda: edited})
    selected = only(base, "unet")
    (check,) = compare_weights(Folder(base), linked, exported.path, selected, "fp32")
    assert (check.passed, check.value) == (False, 1)
    assert TO_K in check.how
    (check,) = compare_weights(Folder(random_folder), linked, exported.path, selected, "fp32")
    assert check.passed


def test_a_negated_cross_attention_fails(damaged: Path, random_folder: Path, linked: Path) -> None:
    file = damaged / "unet" / "openvino_model.bin"
    stored = read_tensor(Folder(random_folder).entries("unet")[TO_K]).float().T.contiguous().numpy()
    data = file.read_bytes()
    assert data.count(stored.tobytes()) == 1
    file.write_bytes(data.replace(stored.tobytes(), (-stored).tobytes()))
    selected = only(random_folder, "unet")
    (check,) = compare_outputs(Folder(random_folder), damaged, selected)
    assert not check.passed
    assert TOLERANCES["fp32"] < check.value < float("inf")
    (check,) = compare_weights(Folder(random_folder), linked, damaged, selected, "fp32")
    assert check.value == 1


def halved(model: Any) -> Any:
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.output().tensor().set_element_type(openvino.Type.f16)
    return steps.build()


def fixed(model: Any) -> None:
    model.reshape({"latent_sample": [1, 4, -1, -1]})


def renamed(model: Any) -> None:
    model.input("latent_sample").get_tensor().set_names({"latents"})


@pytest.mark.parametrize(
    ("change", "wrong"),
    [(halved, ["sample"]), (fixed, ["latent_sample", "sample"]), (renamed, ["latent_sample", "latents"])],
)
def test_other_ports_fail(damaged: Path, random_folder: Path, change: Callable[[Any], Any], wrong: list[str]) -> None:
    rebuilt(damaged / "vae_decoder" / FILE, change)
    check = compare_ports(damaged, only(random_folder, "vae_decoder"))
    assert (check.passed, check.value) == (False, len(wrong))
    assert check.how.endswith(f"vae_decoder/{wrong[0]}")


def test_a_file_that_cannot_be_read_fails_with_its_error(damaged: Path, random_folder: Path) -> None:
    (damaged / "vae_decoder" / FILE).write_text("<net>")
    (check,) = compare_outputs(Folder(random_folder), damaged, only(random_folder, "vae_decoder"))
    assert (check.passed, check.value) == (False, float("inf"))
    assert "RuntimeError" in check.how
    assert str(damaged) not in check.how


def test_memories_are_in_the_graph(base: Path, exported: Artifact, tmp_path: Path) -> None:
    width = Folder(base).entries("unet")[TO_K].shape[0]
    rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    write_extras(base, Extras((Memory(TO_K.removesuffix(".to_k.weight"), *rows),)))
    selected = write_onnx(Folder(base), tmp_path / "linked", names=("unet",))
    convert(tmp_path / "linked" / "unet" / "model.onnx", tmp_path / "ir" / "unet" / FILE)
    (check,) = compare_weights(Folder(base), tmp_path / "linked", tmp_path / "ir", selected, "fp32")
    assert check.passed
    (check,) = compare_outputs(Folder(base), tmp_path / "ir", selected)
    assert check.passed
    (check,) = compare_outputs(Folder(base), exported.path, selected)
    assert not check.passed


def test_other_models_and_options_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasecError, match="option weights is 'fp15'") as caught:
        replace(OpenVino(), weights="fp15")
    assert "did you mean 'fp16'?" in caught.value.why
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("UNet2DConditionModel", "UNet3D"))
    with pytest.raises(ErasecError, match="unet is a UNet3D"):
        OpenVino().export(Folder(base), tmp_path, Context())
    assert list(tmp_path.iterdir()) == [base]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="needs onnx and openvino") as missing:
        OpenVino().check()
    assert missing.value.exit_code == TOOL_MISSING
    assert missing.value.fix == 'pip install "erasec[openvino]"'
