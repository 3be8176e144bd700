"""Target trt-rtx: real engines of small graphs in a folder that stands alone, and engines of others that must fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import TEXT_TO_IMAGE

from erasec.base import Artifact, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError, MissingTool
from erasec.graphs import link
from erasec.graphs.manifest import MANIFEST, write_manifest
from erasec.options import configure
from erasec.recipe.recipe import parse_named_options
from erasec.targets.trt_rtx import TrtRtx
from erasec.tensorrt import engines, patching
from erasec.tensorrt.base import engine_checks
from erasec.tensorrt.engines import RTX, read_record

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")
pytest.importorskip(RTX)

WIDTH, TEXT, HEADS = 64, 128, 4


def attention(path: Path, seed: int = 0) -> None:
    """The inputs and outputs of glyphs' UNet, and one attention of its latents to the text, in float16."""
    from onnx import helper

    rng, nodes = np.random.default_rng(seed), []

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) / 8).astype(np.float16)

    shapes = {"q": (4, WIDTH), "k": (TEXT, WIDTH), "v": (TEXT, WIDTH), "out": (WIDTH, 4)}
    weights = {f"a.to_{name}.weight:transpose": weight(*shape) for name, shape in shapes.items()}
    weights["root"] = np.array((WIDTH // HEADS) ** -0.25, np.float16)
    for name, shape in {"flat": (0, 4, -1), "heads": (0, -1, HEADS, WIDTH // HEADS), "joined": (0, -1, WIDTH)}.items():
        weights[name] = np.array(shape, np.int64)

    def node(kind: str, inputs: Sequence[str], output: str, **options: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **options))

    node("Cast", ["encoder_hidden_states"], "text", to=10)
    node("Cast", ["sample"], "half", to=10)
    node("Shape", ["sample"], "shape")
    node("Reshape", ["half", "flat"], "flat_sample")
    node("Transpose", ["flat_sample"], "x", perm=[0, 2, 1])
    for name, source, turned in (("q", "x", [0, 2, 1, 3]), ("k", "text", [0, 2, 3, 1]), ("v", "text", [0, 2, 1, 3])):
        node("MatMul", [source, f"a.to_{name}.weight:transpose"], f"{name}_all")
        node("Reshape", [f"{name}_all", "heads"], f"{name}_heads")
        node("Transpose", [f"{name}_heads"], f"{name}_turned", perm=turned)
    node("Mul", ["q_turned", "root"], "q")
    node("Mul", ["k_turned", "root"], "k")
    node("MatMul", ["q", "k"], "scores")
    node("Softmax", ["scores"], "shares", axis=-1)
    node("MatMul", ["shares", "v_turned"], "seen")
    node("Transpose", ["seen"], "seen_turned", perm=[0, 2, 1, 3])
    node("Reshape", ["seen_turned", "joined"], "seen_joined")
    node("MatMul", ["seen_joined", "a.to_out.weight:transpose"], "y")
    node("Transpose", ["y"], "y_turned", perm=[0, 2, 1])
    node("Reshape", ["y_turned", "shape"], "y_shaped")
    node("Cast", ["y_shaped"], "out_sample", to=1)
    inputs = {"sample": (1, ["b", 4, "h", "w"]), "timestep": (1, []), "encoder_hidden_states": (1, ["b", "t", TEXT])}
    save(path, nodes, inputs, "out_sample", weights)


def product(path: Path, name: str, kind: int, axes: list[int | str]) -> None:
    """A graph that multiplies its input with a number."""
    from onnx import helper

    nodes = [helper.make_node("Cast", [name], ["wide"], to=1), helper.make_node("Mul", ["wide", "w"], ["y"])]
    save(path, nodes, {name: (kind, axes)}, "y", {"w": np.array([3.25], np.float32)})


def save(
    path: Path, nodes: Sequence[Any], inputs: dict[str, tuple[int, Any]], output: str, weights: dict[str, Any]
) -> None:
    from onnx import helper, numpy_helper

    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    infos = [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()]
    outputs = [helper.make_tensor_value_info(output, 1, None)]
    graph = helper.make_graph(list(nodes), "g", infos, outputs, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def link_small_graphs(checkpoint: Folder, out: Path, precision: str, names: Sequence[str], **options: Any) -> None:
    """In place of the linker, which would take most of a minute of these tests: a folder of small graphs."""
    for name in ("model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.root / name, out / name)
    attention(out / "unet" / "model.onnx")
    product(out / "text_encoder" / "model.onnx", "input_ids", 7, ["b", "t"])
    product(out / "vae_decoder" / "model.onnx", "latent_sample", 1, ["b", 4, "h", "w"])
    for name in names:
        own = {key: value for key, value in options.items() if key != "origin"}
        (out / name / "config.json").write_text(json.dumps({"name": name, "precision": precision} | own))
    record = {"graph": "ab", "precision": precision, "files": {}, "weights": [], "edited": []}
    graphs = {name: {"component": name.removesuffix("_decoder"), **record} for name in names}
    common = {"precision": precision, "vae": "fp32", "files": {}, "base": {}, "carried": []}
    write_manifest(out, {"graphs": graphs, **common})
    (out / "unet" / "model.onnx_data").write_bytes(b"weights")


@pytest.fixture(scope="module")
def exported(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "write_onnx", link_small_graphs)
        return TrtRtx(onnx=True, workspace=64).export(
            Folder(random_folder), tmp_path_factory.mktemp("exported"), Context()
        )


@pytest.fixture
def copied(exported: Artifact, tmp_path: Path) -> Path:
    """A copy of the export for a test to damage."""
    return Path(shutil.copytree(exported.path, tmp_path / "copied"))


def test_engines_are_compared_with_the_graphs_that_they_were_built_from(
    copied: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "write_onnx", link_small_graphs)
    target = TrtRtx(onnx=True, workspace=64)
    checks = target.compare(Folder(random_folder), copied)
    assert {check.passed for check in checks} == {True} and all(check.limit is not None for check in checks)
    assert {"trt-rtx/files", "engine/unet/source", "onnx/files", "graph/unet"} <= {check.name for check in checks}
    assert "engine" in target.unread_reason() and not target.how_to_undo()
    engine = copied / "text_encoder" / "model.engine"
    engine.write_bytes(engine.read_bytes() + b"\0")
    failed = [check.name for check in target.compare(Folder(random_folder), copied) if not check.passed]
    assert failed == ["engine/text_encoder/source"]


def test_engine_json_does_not_choose_what_is_compared(
    copied: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "write_onnx", link_small_graphs)
    target = TrtRtx(onnx=True, workspace=64)
    original = engines.read_record(copied)

    def failed(change: Callable[[dict[str, Any]], object]) -> list[str]:
        record = json.loads(json.dumps(original))
        change(record["components"])
        engines.rewrite_record(copied, record)
        return [check.name for check in target.compare(Folder(random_folder), copied) if not check.passed]

    (copied / "onnx" / "unet" / "more").write_bytes((copied / "unet" / "model.engine").read_bytes())
    assert failed(lambda parts: parts["unet"].update(file="onnx/unet/more"))[0] == "engine/unet/source"
    (copied / "onnx" / "unet" / "more").unlink()
    assert failed(lambda parts: None) == []
    assert failed(lambda parts: parts.pop("unet")) == ["trt-rtx/engines"]
    with pytest.raises(ErasecError, match="'/dev/zero' is no file of the folder"):
        failed(lambda parts: parts["unet"].update(file="/dev/zero"))
    (copied / "other.engine").touch()
    assert failed(lambda parts: None) == ["trt-rtx/files"]


def test_the_folder_stands_alone(exported: Artifact) -> None:
    files = {path.relative_to(exported.path).as_posix() for path in exported.path.rglob("*") if path.is_file()}
    own = {name for name in files if not name.startswith("onnx/")}
    parts = {f"{name}/{file}" for name in TEXT_TO_IMAGE for file in ("model.engine", "config.json")}
    assert own == parts | {"engine.json", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"}
    assert {f"onnx/{name}/model.onnx" for name in TEXT_TO_IMAGE} | {f"onnx/{MANIFEST}"} <= files - own
    config = json.loads((exported.path / "unet" / "config.json").read_text())
    assert config == {"name": "unet", "precision": "fp16", "vae": "fp32"}


def test_the_record_describes_each_engine(exported: Artifact) -> None:
    record = read_record(exported.path)
    assert set(record["components"]) == set(TEXT_TO_IMAGE)
    assert [record["components"][name]["precision"] for name in TEXT_TO_IMAGE] == ["fp16", "fp16", "fp32"]
    assert record["workspace"] == 64 and record["builder"]["version"] == engines.version(RTX)
    profile = record["components"]["unet"]["profile"]
    assert profile["sample"] == {"min": [1, 4, 4, 4], "opt": [2, 4, 8, 8], "max": [8, 4, 12, 12]}


def test_all_checks_pass_on_what_was_built(exported: Artifact) -> None:
    checks = {check.name: check for check in exported.checks}
    wanted = {f"engine/{name}/{what}" for name in TEXT_TO_IMAGE for what in ("source", "MB", "seconds")}
    assert set(checks) == wanted | {"engine/unet/text"}
    assert all(check.passed for check in exported.checks)
    size = (exported.path / "unet" / "model.engine").stat().st_size
    assert checks["engine/unet/MB"].value == size / 1e6 and checks["engine/unet/MB"].limit is None
    assert checks["engine/unet/text"].limit == 0.0 and "of 2 matrices" in checks["engine/unet/text"].how
    assert "tensorrt_rtx" in checks["engine/unet/seconds"].how


def failed(folder: Path, graph: Path) -> set[str]:
    return {check.name for check in engine_checks(folder, "unet", graph) if not check.passed}


def test_an_engine_for_another_base_fails(copied: Path, tmp_path: Path) -> None:
    graph = copied / "onnx" / "unet" / "model.onnx"
    assert failed(copied, graph) == set()
    attention(tmp_path / "other.onnx", seed=1)
    assert failed(copied, tmp_path / "other.onnx") == {"engine/unet/source", "engine/unet/text"}
    product(tmp_path / "graph.onnx", "sample", 1, ["b", 4, "h", "w"])
    (source, *_) = engine_checks(copied, "unet", tmp_path / "graph.onnx")
    assert (source.value, source.passed) == (2.0, False)
    assert "graph, weights" in source.how


def test_an_exchanged_engine_fails(copied: Path) -> None:
    shutil.copyfile(copied / "vae_decoder" / "model.engine", copied / "unet" / "model.engine")
    graph = copied / "onnx" / "unet" / "model.onnx"
    assert failed(copied, graph) == {"engine/unet/source", "engine/unet/text"}
    (copied / "unet" / "model.engine").unlink()
    assert failed(copied, graph) == {"engine/unet/source"}


@pytest.mark.parametrize("part", ["k", "v"])
def test_a_changed_text_projection_fails_although_the_record_agrees(copied: Path, part: str) -> None:
    file, graph = copied / "unet" / "model.engine", copied / "onnx" / "unet" / "model.onnx"
    place = patching.locate(file, patching.text_projections(graph))[f"a.to_{part}.weight:transpose"]
    data = bytearray(file.read_bytes())
    data[place.offset + 7 * place.stride + 2] ^= 1
    file.write_bytes(data)
    record = read_record(copied)
    record["components"]["unet"]["engine"] = file_digest(file)
    engines.rewrite_record(copied, record)
    assert failed(copied, graph) == {"engine/unet/text"}


def test_an_unknown_layout_is_reported_and_not_enforced(copied: Path, tmp_path: Path) -> None:
    attention(tmp_path / "other.onnx", seed=1)
    record = read_record(copied)
    record["builder"]["version"] = "9.0.0.1"
    engines.rewrite_record(copied, record)
    checks = {check.name: check for check in engine_checks(copied, "unet", tmp_path / "other.onnx")}
    text = checks["engine/unet/text"]
    assert (text.value, text.limit, text.passed) == (2.0, None, True)
    assert "as the layout of tensorrt_rtx 9.0.0.1 is unknown" in text.how


def test_the_folder_has_no_other_files(random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, engines.Builder]] = []

    def build(graph: Path, file: Path, profile: engines.Profile, builder: engines.Builder) -> tuple[Any, str]:
        assert graph.is_file()
        made.append((graph.parent.name, builder))
        file.write_bytes(graph.parent.name.encode())
        return engines.engine_entry(file, ("", ""), profile, 0.0), "1.7.1"

    monkeypatch.setattr(link, "write_onnx", link_small_graphs)
    monkeypatch.setattr(engines, "build_engine", build)
    artifact = TrtRtx(capabilities="80+89").export(Folder(random_folder), tmp_path, Context())
    assert {path.name for path in artifact.path.iterdir()} == {
        "engine.json",
        "model_index.json",
        "scheduler",
        "tokenizer",
        *TEXT_TO_IMAGE,
    }
    assert made == [(name, engines.Builder(RTX, ("80", "89"))) for name in TEXT_TO_IMAGE]
    assert {check.name for check in artifact.checks if not check.passed} == {
        "engine/text_encoder/source",
        "engine/unet/source",
        "engine/vae_decoder/source",
        "engine/unet/text",
    }


def test_patch_goes_through_the_cache_for_the_unet_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    monkeypatch.setattr(engines, "build_engine", lambda *args: ways.append("build"))
    monkeypatch.setattr(patching, "patched_engine", lambda *args: ways.append("patch"))
    for target in (TrtRtx(), TrtRtx(patch=True)):
        for name in ("vae_decoder", "unet"):
            target.engine(tmp_path / name / "model.onnx", tmp_path / "model.engine", {})
    assert ways == ["build", "build", "build", "patch"]


def test_numbers_on_a_command_line_are_options_too(random_folder: Path) -> None:
    use = parse_named_options("trt-rtx:batch=2,height=64,width=64:64:96,capabilities=89", "--target")
    target = configure(TrtRtx, use.options, "trt-rtx")
    assert target == TrtRtx(batch="2", height="64", width="64:64:96", capabilities="89")
    assert target.profiles(Folder(random_folder))["vae_decoder"] == {
        "latent_sample": [(2, 4, 8, 8)] * 2 + [(2, 4, 8, 12)]
    }


def test_another_kind_of_model_is_refused_before_anything_is_written(random_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(random_folder, tmp_path / "model"))
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "Transformer2DModel"]}))
    with pytest.raises(ErasecError, match="the model has the component transformer"):
        TrtRtx().export(Folder(root), tmp_path / "out", Context())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"precision": "fp8"}, "option precision is 'fp8'"),
        ({"vae": "half"}, "option vae is 'half'"),
        ({"batch": "4,1"}, "option batch is '4,1'"),
        ({"workspace": -1}, "option workspace is -1"),
        ({"capabilities": "80+90"}, "option capabilities has '90'"),
        ({"capabilities": 75}, "option capabilities has '75'"),
        ({"capabilites": "80"}, "no option 'capabilites'"),
        ({"patch": 1}, "option patch is 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(ErasecError) as caught:
        configure(TrtRtx, options, "trt-rtx")
    assert what in caught.value.what
    assert caught.value.why


def test_a_plan_ends_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    TrtRtx().check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="trt-rtx needs onnx and polygraphy and tensorrt_rtx"):
        TrtRtx().check()


@pytest.mark.slow
def test_glyphs_with_the_real_linker(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    glyphs = Folder(root / "compiler" / "glyphs" / "weights" / "glyphs")
    (tmp_path / "out").mkdir()
    artifact = TrtRtx().export(glyphs, tmp_path / "out", Context())
    assert all(check.passed for check in artifact.checks)
    text = next(check for check in artifact.checks if check.name == "engine/unet/text")
    assert text.limit == 0.0 and "of 14 matrices" in text.how
