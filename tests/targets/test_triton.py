"""Target triton: where files lie, configurations against graphs, parity as served, and damage that the checks find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import TEXT_TO_IMAGE

from erasec.base import Artifact, Context
from erasec.checkpoint.folder import Folder
from erasec.errors import TOOL_MISSING, ErasecError, MissingTool
from erasec.graphs.signature import graphs
from erasec.model.loading import load
from erasec.targets.triton import Triton, compare_outputs, config, parse_config, repository_check
from erasec.targets.trt import Trt
from erasec.tensorrt import devices, engines
from erasec.tensorrt.engines import Builder, Profile

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

UNET = """name: "unet"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: 0
input {
  name: "sample"
  data_type: TYPE_FP32
  dims: [ -1, 4, -1, -1 ]
}
input {
  name: "timestep"
  data_type: TYPE_FP32
  dims: [ 1 ]
}
input {
  name: "encoder_hidden_states"
  data_type: TYPE_FP32
  dims: [ -1, -1, 128 ]
}
output {
  name: "out_sample"
  data_type: TYPE_FP32
  dims: [ -1, 4, -1, -1 ]
}
instance_group {
  count: 1
  kind: KIND_CPU
}
version_policy {
  specific {
    versions: [ 2 ]
  }
}
"""


@pytest.fixture(scope="module")
def exported(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    target = Triton(version=2, instances="cpu")
    return target.export(Folder(random_folder), tmp_path_factory.mktemp("served"), Context())


@pytest.fixture
def models(exported: Artifact, tmp_path: Path) -> Path:
    """A copy of the repository for a test to damage."""
    return Path(shutil.copytree(exported.path / "models", tmp_path / "models"))


def test_a_repository_is_compared_with_its_checkpoint_and_with_another(
    exported: Artifact, random_folder: Path, tmp_path: Path
) -> None:
    target = Triton(version=2, instances="cpu")
    assert {check.passed for check in target.compare(Folder(random_folder), exported.path)} == {True}
    out = Path(shutil.copytree(exported.path, tmp_path / "out"))
    data = out / "models" / "unet" / "2" / "model.onnx_data"
    with data.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    failed = [check.name for check in target.compare(Folder(random_folder), out) if not check.passed]
    assert failed == ["weights/unet"]
    assert (target.unread_reason(), bool(Triton(engines="trt").unread_reason())) == ("", True)


def with_constant(file: Path, side: int) -> None:
    """Add a node that holds a matrix to an ONNX file."""
    model = onnx.load(file, load_external_data=False)
    value = onnx.numpy_helper.from_array(np.ones((side, side), np.float32))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["old"], name="old", value=value))
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda out: shutil.copytree(out / "models/unet/2", out / "models/unet/3"), "triton/files"),
        (lambda out: (out / "client/tokenizer/merges.txt").write_text(""), "triton/copies"),
        (lambda out: replace_text(out / "models", "[ 2 ]", "[ 3 ]"), "triton/configs"),
        (lambda out: with_constant(out / "models/unet/2/model.onnx", 200), "graph/unet"),
    ],
)
def test_what_a_repository_holds_besides_the_weights_is_compared_too(
    exported: Artifact, random_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], name: str
) -> None:
    out = Path(shutil.copytree(exported.path, tmp_path / "out"))
    damage(out)
    checks = Triton(version=2, instances="cpu").compare(Folder(random_folder), out)
    assert [check.name for check in checks if not check.passed] == [name]


def test_other_nodes_are_not_compared_and_that_is_stated(
    exported: Artifact, random_folder: Path, tmp_path: Path
) -> None:
    """Another version of torch may export them."""
    out = Path(shutil.copytree(exported.path, tmp_path / "out"))
    with_constant(out / "models/unet/2/model.onnx", 2)
    checks = Triton(version=2, instances="cpu").compare(Folder(random_folder), out)
    assert all(check.passed for check in checks)
    assert [check.name for check in checks if check.limit is None] == ["graph/unet"]


def test_files_lie_where_the_server_and_the_client_look(exported: Artifact, random_folder: Path) -> None:
    served = {
        f"models/{name}/{file}"
        for name in TEXT_TO_IMAGE
        for file in ("config.pbtxt", "2/model.onnx", "2/model.onnx_data")
    }
    client = {f"client/{name}/config.json" for name in TEXT_TO_IMAGE}
    client |= {"client/model_index.json", "client/scheduler/scheduler_config.json"}
    client |= {f"client/tokenizer/{path.name}" for path in (random_folder / "tokenizer").iterdir()}
    assert {name.as_posix() for name in Folder(exported.path).files()} == served | client | {"README.md"}
    assert sorted(path.name for path in exported.path.rglob(".*")) == []
    # Each folder of a repository is a model to the server.
    assert sorted(path.name for path in (exported.path / "models").iterdir()) == sorted(TEXT_TO_IMAGE)


def test_the_configuration_has_all_that_the_server_reads(exported: Artifact) -> None:
    assert (exported.path / "models" / "unet" / "config.pbtxt").read_text() == UNET
    fields = parse_config(UNET)
    assert [port["name"] for port in fields["input"]] == [["sample"], ["timestep"], ["encoder_hidden_states"]]
    assert fields["input"][0] == {"name": ["sample"], "data_type": ["TYPE_FP32"], "dims": [[-1, 4, -1, -1]]}
    assert fields["version_policy"] == [{"specific": [{"versions": [[2]]}]}]
    text = parse_config((exported.path / "models" / "text_encoder" / "config.pbtxt").read_text())
    assert text["input"] == [{"name": ["input_ids"], "data_type": ["TYPE_INT64"], "dims": [[-1, -1]]}]
    readme = (exported.path / "README.md").read_text()
    assert "Version 2 of each model is served" in readme
    assert "| unet | `sample` [-1, 4, -1, -1]; `timestep` [1]; " in readme


def test_all_checks_pass_on_what_was_exported(exported: Artifact) -> None:
    names = [f"{kind}/{name}" for kind in ("weights", "parity") for name in TEXT_TO_IMAGE]
    assert [check.name for check in exported.checks] == ["triton/repository", *names]
    assert all(check.passed for check in exported.checks)
    assert all(0 < check.value < 2e-5 for check in exported.checks if check.name.startswith("parity"))


def test_the_plan_counts_graphs_and_plans(random_folder: Path) -> None:
    model = load(str(random_folder))
    whole = Triton().size(model)
    assert whole == pytest.approx(
        2 * sum(path.stat().st_size for path in random_folder.rglob("*.safetensors")), rel=0.02
    )
    assert Triton(precision="fp16").size(model) == whole // 2
    assert Triton(engines="trt").size(model) == 2 * whole


def test_the_timestep_is_a_vector_for_the_server_and_a_scalar_inside(exported: Artifact) -> None:
    session = onnxruntime.InferenceSession(exported.path / "models" / "unet" / "2" / "model.onnx")
    assert {value.name: value.shape for value in session.get_inputs()}["timestep"] == [1]
    feed = {"sample": np.ones((3, 4, 8, 8), np.float32), "encoder_hidden_states": np.ones((3, 77, 128), np.float32)}
    whole, fraction = (session.run(None, {**feed, "timestep": np.array([t], np.float32)})[0] for t in (10.0, 10.5))
    assert whole.shape == (3, 4, 8, 8)
    assert np.abs(whole - fraction).max() > 1e-6


def replace_text(models: Path, old: str, new: str) -> None:
    file = models / "unet" / "config.pbtxt"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def other_type(models: Path) -> None:
    model = onnx.load(models / "unet" / "2" / "model.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Cast", ["out_sample"], ["out_half"], to=onnx.TensorProto.FLOAT16))
    model.graph.output[0].name = "out_half"
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    (models / "unet" / "2" / "model.onnx").write_bytes(model.SerializeToString())


def move_version(models: Path) -> None:
    (models / "unet" / "2").rename(models / "unet" / "1")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "renamed": (
        lambda models: replace_text(models, '"sample"', '"samples"'),
        "unet: input sample is None in config.pbtxt",
    ),
    "typed": (lambda models: replace_text(models, "TYPE_FP32", "TYPE_FP16"), "unet: input "),
    "scalar": (lambda models: replace_text(models, "dims: [ 1 ]", "dims: [ -1 ]"), "unet: input timestep is "),
    "batched": (lambda models: replace_text(models, "max_batch_size: 0", "max_batch_size: 8"), "unet: name, max_batch"),
    "titled": (lambda models: replace_text(models, '"unet"', '"denoiser"'), "unet: name, max_batch_size, platform, "),
    "backend": (
        lambda models: replace_text(models, '"onnxruntime"', '"tensorrt"'),
        "unet: name, max_batch_size, platform, ",
    ),
    "damaged": (
        lambda models: replace_text(models, "output {", "output [{"),
        "unet: config.pbtxt is missing or damaged",
    ),
    "unlimited": (
        lambda models: replace_text(models, "version_policy {\n  specific {\n    versions: [ 2 ]\n  }\n}\n", ""),
        "unet: config.pbtxt is missing or damaged",
    ),
    "graph": (other_type, "unet: output out_"),
    "moved": (move_version, "unet has no 2/model.onnx"),
    "data": (lambda models: (models / "unet" / "2" / "model.onnx_data").unlink(), "unet/2/model.onnx cannot be loaded"),
    "config": (lambda models: (models / "unet" / "config.pbtxt").unlink(), "unet: config.pbtxt is missing or damaged"),
    "model": (lambda models: shutil.rmtree(models / "unet"), "there is no unet"),
    "folder": (lambda models: (models / "tokenizer").mkdir(), "Triton would load tokenizer as a model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_the_server_would_not_serve_fails_with_a_reason(models: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(models)
    check = repository_check(models, models, TEXT_TO_IMAGE)
    assert not check.passed
    assert check.value >= 1
    assert f"the first is {words}" in check.how


def test_a_damaged_model_fails_parity(models: Path, random_folder: Path) -> None:
    selected = tuple(graph for graph in graphs(Folder(random_folder)) if graph.name == "vae_decoder")
    (check,) = compare_outputs(Folder(random_folder), models, selected, 2)
    assert check.passed
    file = models / "vae_decoder" / "2" / "model.onnx_data"
    data = np.fromfile(file, np.float32)
    (data * np.float32(1.01)).tofile(file)
    (check,) = compare_outputs(Folder(random_folder), models, selected, 2)
    assert not check.passed
    (check,) = compare_outputs(Folder(random_folder), models, selected, 1)
    assert (check.passed, check.value) == (False, float("inf"))


def test_plans_are_configured_and_recorded(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library that writes a word where TensorRT writes a plan."""
    profiles: dict[str, Profile] = {}

    def build(graph: Path, file: Path, profile: Profile, builder: Builder) -> tuple[dict[str, Any], str]:
        profiles[graph.parent.name] = profile
        assert onnx.load(graph, load_external_data=False).graph.input
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"plan")
        return engines.engine_entry(file, engines.digests(graph), profile, 1.0), "11.4.0"

    monkeypatch.setattr(engines, "build_engine", build)
    monkeypatch.setattr(Trt, "check", lambda target: None)
    target = Triton(engines="trt")
    target.check()
    artifact = target.export(Folder(random_folder), tmp_path, Context())
    assert all(check.passed for check in artifact.checks), artifact.checks
    assert [check.name for check in artifact.checks][:2] == ["triton/repository", "weights/text_encoder"]
    assert "timestep" not in profiles["unet"]  # one shape, so no range of them
    files = {path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*.*") if path.is_file()}
    assert {name for name in files if name.startswith("models")} == {
        f"models/{name}/{file}" for name in TEXT_TO_IMAGE for file in ("config.pbtxt", "1/model.plan")
    }
    fields = parse_config((artifact.path / "models" / "unet" / "config.pbtxt").read_text())
    assert (fields["platform"], fields["backend"]) == (["tensorrt_plan"], ["tensorrt"])
    assert fields["default_model_filename"] == ["model.plan"]
    assert fields["instance_group"] == [{"count": [1], "kind": ["KIND_AUTO"]}]
    record = engines.read_record(artifact.path)
    assert record["components"]["unet"]["file"] == "models/unet/1/model.plan"
    checks = target.compare(Folder(random_folder), artifact.path)
    assert all(check.passed for check in checks), checks
    assert [check.name for check in checks][-1] == "engine/vae_decoder/source"


def test_wrong_options_and_missing_tools_are_refused(random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: tuple[tuple[Mapping[str, Any], str], ...] = (
        ({"version": 0}, "version is 0"),
        ({"instances": "tpu"}, "option instances is 'tpu'"),
        ({"precision": "fp8"}, "option precision is 'fp8'"),
        ({"engines": "trt-rtx"}, "option engines is 'trt-rtx'"),
        ({"engines": "trt", "instances": "cpu"}, "plans of TensorRT do not run on a CPU"),
    )
    for options, words in refused:
        with pytest.raises(ErasecError, match=words):
            Triton(**options)
    monkeypatch.setattr(engines, "require_library", lambda library: None)
    monkeypatch.setattr(devices, "gpus", list)
    Triton().check()
    with pytest.raises(MissingTool, match="trt needs an NVIDIA GPU"):
        Triton(engines="trt").check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="needs onnx and onnxruntime") as missing:
        Triton().check()
    assert missing.value.exit_code == TOOL_MISSING


def test_other_texts_are_refused(tmp_path: Path) -> None:
    text = config("unet", {"a": ("TYPE_FP32", (-1, 3))}, {"b": ("TYPE_INT64", (1,))}, 7, "KIND_GPU")
    assert parse_config(text)["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"]}]
    for wrong in ('name: "unet', "name unet", "input {", "}", "dims: [ 1, x ]", "a: 1 b: 2"):
        with pytest.raises(ErasecError, match=r"config\.pbtxt cannot be read"):
            parse_config(wrong)


@pytest.mark.network
def test_tritons_own_message_takes_the_configurations(exported: Artifact, tmp_path: Path) -> None:
    """In an environment of its own, as tritonclient wants an older protobuf."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "-q", "tritonclient[grpc]"], check=True, env=clean)
    code = (
        "import sys; from google.protobuf import text_format; from tritonclient.grpc import model_config_pb2 as pb\n"
        "for file in sys.argv[1:]:\n"
        "    fields = text_format.Parse(open(file).read(), pb.ModelConfig())\n"
        "    types = [pb.DataType.Name(port.data_type) for port in fields.input]\n"
        "    print(fields.name, types, list(fields.input[-1].dims))\n"
    )
    files = [exported.path / "models" / name / "config.pbtxt" for name in TEXT_TO_IMAGE]
    done = subprocess.run([python, "-c", code, *files], check=True, capture_output=True, text=True, env=clean)
    assert done.stdout.splitlines() == [
        "text_encoder ['TYPE_INT64'] [-1, -1]",
        "unet ['TYPE_FP32', 'TYPE_FP32', 'TYPE_FP32'] [-1, -1, 128]",
        "vae_decoder ['TYPE_FP32'] [-1, 4, -1, -1]",
    ]
    files[0].with_name("other.pbtxt").write_text(files[0].read_text().replace("dims", "dimensions"))
    wrong = subprocess.run([python, "-c", code, files[0].with_name("other.pbtxt")], capture_output=True, env=clean)
    files[0].with_name("other.pbtxt").unlink()
    assert wrong.returncode != 0
