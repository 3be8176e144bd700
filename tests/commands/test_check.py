"""``erasec check``: an unchanged build passes, a flipped bit in any file is found, and missing libraries are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import GRAPHS
from typer.testing import CliRunner

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import FLOATS, patch_file, read_header, read_tensor
from erasec.cli.app import app
from erasec.commands.check import examine, raise_for_failures, small_inputs, weight_precision
from erasec.errors import CHECK_FAILED, TOOL_MISSING, CheckFailed, ErasecError, MissingTool
from erasec.graphs.link import BASE, EDITED, write_onnx
from erasec.graphs.manifest import MANIFEST
from erasec.graphs.weights import digests
from erasec.reporting.collect import written_files
from erasec.tensorrt import devices, engines

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def out(variant: Callable[[str], Any], tmp_path: Path) -> Path:
    """What a build leaves, for a test to damage: the checkpoint, its ONNX folder, and the report that tells of both."""
    edited, out = variant("a"), tmp_path / "out"
    shutil.copytree(edited.folder, out / "hf")
    shutil.copytree(edited.onnx, out / "onnx")
    write_report(out, "hf", "onnx")
    return out


def write_report(out: Path, *names: str) -> None:
    written = []
    for name in names:
        files = written_files(name, out / name).files
        listed = {path: {"bytes": size, "sha256": digest} for path, (size, digest) in files.items()}
        written.append({"target": name, "path": name, "files": listed})
    (out / "report.json").write_text(json.dumps({"written": written}))


def flip(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def failed(folder: Path, against: Path | None = None) -> dict[str, str]:
    """How the checks that failed were made, by name."""
    return {check.name: check.how for check in examine(folder, against).checks if not check.passed}


@pytest.fixture
def files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run", "_parity", "_finite"):
        monkeypatch.setattr(f"erasec.commands.check.{name}", lambda *_: ())


def test_a_build_passes(out: Path) -> None:
    examination = examine(out)
    assert {check.name for check in examination.checks if not check.passed} == set()
    assert {check.name for check in examination.checks} == {
        "hf/files",
        "hf/finite/text_encoder",
        "hf/finite/unet",
        "hf/finite/vae",
        "onnx/files",
        *(f"onnx/{kind}/{name}" for kind in ("finite", "weights", "parity") for name in GRAPHS),
    }
    assert examination.missing == ()
    raise_for_failures(examination, out)


@pytest.mark.usefixtures("files_only")
@pytest.mark.parametrize(
    "name",
    [
        "hf/model_index.json",
        f"hf/{WEIGHTS}",
        "hf/unet/config.json",
        "hf/tokenizer/vocab.json",
        f"onnx/{MANIFEST}",
        "onnx/model_index.json",
        "onnx/scheduler/scheduler_config.json",
        "onnx/tokenizer/merges.txt",
        "onnx/text_encoder/config.json",
        "onnx/unet/model.onnx",
        f"onnx/unet/{BASE}",
        f"onnx/unet/{EDITED}",
        f"onnx/vae_decoder/{BASE}",
    ],
)
def test_one_bit_in_any_file_of_a_build_is_found(out: Path, name: str) -> None:
    assert failed(out) == {}
    flip(out / name)
    target, file = name.split("/", 1)
    failures = failed(out)
    assert f"changed: {file}" in failures.pop(f"{target}/files")
    assert failures.keys() <= {f"{target}/finite"}  # a bit of model_index.json makes it name another library
    with pytest.raises(CheckFailed, match=f"checks failed: {target}/files"):
        raise_for_failures(examine(out), out)


@pytest.mark.usefixtures("files_only")
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/model.onnx",
        f"unet/{BASE}",
        f"unet/{EDITED}",
        f"text_encoder/{BASE}",
    ],
)
def test_an_onnx_folder_alone_has_the_digests_of_its_files(out: Path, tmp_path: Path, name: str) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    assert failed(alone) == {}
    flip(alone / name)
    assert f"changed: {name}" in failed(alone)["onnx/files"]


@pytest.mark.usefixtures("files_only")
def test_missing_and_added_files_are_found(out: Path) -> None:
    (out / "onnx" / "tokenizer" / "vocab.json").unlink()
    (out / "hf" / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    failures = failed(out)
    assert "lost: tokenizer/vocab.json" in failures["onnx/files"]
    assert "added: unet/diffusion_pytorch_model.fp16.safetensors" in failures["hf/files"]


@pytest.mark.usefixtures("files_only")
def test_a_target_that_was_not_copied_is_not_an_error(out: Path) -> None:
    shutil.rmtree(out / "hf")
    assert [check.name for check in examine(out).checks] == ["onnx/files"]


@pytest.mark.usefixtures("files_only")
def test_the_manifest_of_another_base_is_found(out: Path, variant: Callable[[str], Any], tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    shutil.copy(variant("b").onnx / MANIFEST, alone / MANIFEST)
    assert f"changed: unet/{EDITED}" in failed(alone)["onnx/files"]


def test_a_damaged_manifest_is_a_check_that_failed(out: Path, tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    (alone / MANIFEST).write_text("{")
    assert "is no ONNX folder" in failed(alone)["onnx/files"]


def test_another_checkpoint_is_found(out: Path, variant: Callable[[str], Any]) -> None:
    assert failed(out / "onnx", variant("b").folder).keys() == {"onnx/weights/unet", "onnx/parity/unet"}
    with pytest.raises(ErasecError, match="is no checkpoint"):
        examine(out / "onnx", out)


def test_graphs_with_nan_outputs_and_damaged_graphs_are_found(out: Path, tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    size = (alone / "text_encoder" / BASE).stat().st_size
    (alone / "text_encoder" / BASE).write_bytes(np.full(size // 4, np.nan, np.float32).tobytes())
    os.truncate(alone / "vae_decoder" / "model.onnx", 5000)
    os.truncate(alone / "unet" / EDITED, 100)
    failures = failed(alone)
    assert failures.keys() == {
        "onnx/files",
        "onnx/finite/text_encoder",
        "onnx/finite/unet",
        "onnx/finite/vae_decoder",
    }
    assert "the first is last_hidden_state" in failures["onnx/finite/text_encoder"]
    for name in ("unet", "vae_decoder"):
        assert "the graph cannot be run" in failures[f"onnx/finite/{name}"]
        assert str(alone) not in failures[f"onnx/finite/{name}"]


def test_weights_that_are_not_finite_are_found(out: Path) -> None:
    file = out / "hf" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    assert failed(out / "hf").keys() == {"hf/finite/unet"}


def test_checks_that_need_no_library_are_made_without_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    examination = examine(out / "onnx")
    assert [(check.name, check.passed) for check in examination.checks] == [("onnx/files", True)]
    with pytest.raises(MissingTool, match="onnxruntime"):
        raise_for_failures(examination, out)
    flip(out / "onnx" / "model_index.json")
    with pytest.raises(CheckFailed):  # which is the worse of the two
        raise_for_failures(examine(out / "onnx"), out)


def test_a_folder_that_is_no_build_is_an_error(tmp_path: Path, out: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ErasecError, match="is no build and no target's folder"):
            examine(folder)
    (out / "report.json").write_text('{"written": 1}')
    with pytest.raises(ErasecError, match=r"report\.json cannot be read"):
        examine(out)


@pytest.mark.usefixtures("files_only")
def test_a_target_that_only_the_report_knows_is_compared_too(out: Path) -> None:
    (out / "ldm").mkdir()
    (out / "ldm" / "model.safetensors").write_bytes(bytes(1000))
    write_report(out, "hf", "onnx", "ldm")
    assert failed(out) == {}
    flip(out / "ldm" / "model.safetensors")
    assert "changed: model.safetensors" in failed(out)["ldm/files"]


def test_a_checkpoint_is_compared_with_another(
    out: Path, variant: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out / "hf")
    results = examine(Path(), variant("a").folder).checks
    assert {check.name: check.passed for check in results}["hf/same"] is True
    other = failed(out / "hf", variant("b").folder)
    assert other.keys() == {"hf/same"}
    assert "the first is unet/" in other["hf/same"]
    (out / "hf" / "erasec.safetensors").write_bytes((out / "hf" / WEIGHTS).read_bytes())
    assert "hf/same" in failed(out / "hf", variant("a").folder)


def test_a_build_of_a_variant_is_compared_with_that_variant(out: Path, tmp_path: Path) -> None:
    """The edited component is there as the variant alone, what was not edited as both."""
    (out / "hf" / WEIGHTS).rename(out / "hf" / WEIGHTS.replace(".", ".fp16.", 1))
    file = out / "hf" / "text_encoder" / "model.safetensors"
    chosen = file.rename(file.with_name("model.fp16.safetensors"))
    patch_file(
        chosen,
        file,
        {
            key: partial(torch.zeros_like, read_tensor(entry))
            for key, entry in read_header(chosen)[0].items()
            if entry.dtype in FLOATS
        },
    )
    assert failed(out / "onnx", out / "hf") == {}


@pytest.fixture
def built(out: Path, tmp_path: Path) -> Path:
    """A folder of engines, which are no programs here."""
    folder = tmp_path / "engines"
    shutil.copytree(out / "onnx", folder, ignore=shutil.ignore_patterns("model.*", MANIFEST))
    shapes = {
        "text_encoder": {"input_ids": (2, 77)},
        "vae_decoder": {"latent_sample": (1, 4, 8, 8)},
        "unet": {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 128)},
    }
    components = {}
    for name, inputs in shapes.items():
        (folder / name / engines.ENGINE).write_bytes(name.encode() * 1000)
        profile = {key: [shape] * 3 for key, shape in inputs.items()}
        components[name] = engines.engine_entry(folder / name / engines.ENGINE, ("graph", "weights"), profile, 1.0)
    engines.write_record(folder, engines.Builder(engines.RTX, ("89",)), "1.7.0.0", components)
    return folder


def components(folder: Path) -> list[str]:
    return list(engines.read_record(folder)["components"])


def record(folder: Path, source: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The record of a folder of engines, were they built from what has these digests."""
    record = engines.read_record(folder)
    for name, (graph, weights) in source.items():
        record["components"][name] |= {"graph": graph, "weights": weights, "precision": "fp32"}
    return record


def test_engines_are_compared_with_their_record_and_this_machine(
    built: Path, variant: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "require_library", lambda _: None)
    monkeypatch.setattr(engines, "version", lambda _: "1.7.0.0")
    monkeypatch.setattr(devices, "gpus", list)
    examination = examine(built)
    assert [(check.name, check.passed) for check in examination.checks] == [("trt-rtx/files", True)]
    with pytest.raises(MissingTool, match="do not run on this machine"):
        raise_for_failures(examination, built)
    monkeypatch.setattr(devices, "gpus", lambda: [("another", "75")])
    assert "for compute capability 8.9" in failed(built)["trt-rtx/here"]

    seen = dict[str, Any]()

    class Session:
        def __init__(self, file: Path) -> None:
            self.name = file.parent.name

        def run(self, inputs: Any) -> dict[str, Any]:
            seen[self.name] = {key: value.shape for key, value in inputs.items()}
            return {"output": np.full(3, np.nan if self.name == "unet" else 1.0)}

        def close(self) -> None:
            pass

    monkeypatch.setattr(engines, "Session", Session)
    monkeypatch.setattr(devices, "gpus", lambda: [("this", "89")])
    assert failed(built).keys() == {"trt-rtx/finite/unet"}
    assert seen["unet"] == {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 128), "timestep": ()}
    assert seen["text_encoder"] == {"input_ids": (2, 77)}

    source = {name: digests(built.parent / "out" / "onnx" / name / "model.onnx") for name in components(built)}
    engines.rewrite_record(built, record(built, source))
    assert failed(built, built.parent / "out" / "hf").keys() == {"trt-rtx/finite/unet"}
    assert failed(built, variant("b").folder).keys() == {"trt-rtx/finite/unet", "trt-rtx/source/unet"}

    flip(built / "unet" / engines.ENGINE)
    assert {"trt-rtx/files", "trt-rtx/here"} <= failed(built).keys()
    (built / engines.RECORD).write_text("{")
    assert all("is no folder of engines" in how for how in failed(built).values())


def test_openvino_is_run_and_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from erasec.targets.ov import FILE, convert

    monkeypatch.setattr("erasec.commands.check.NAMES", ("text_encoder",))
    folder = out / "openvino"
    shutil.copytree(out / "onnx", folder, ignore=shutil.ignore_patterns("model.onnx*", "model.edited*", MANIFEST))
    (folder / "unet" / FILE).touch()  # by which the folder is known; it is not run here
    convert(out / "onnx" / "text_encoder" / "model.onnx", folder / "text_encoder" / FILE)
    finite, parity = examine(folder, out / "hf").checks
    assert [(check.name, check.passed) for check in (finite, parity)] == [
        ("openvino/finite/text_encoder", True),
        ("openvino/parity/text_encoder", True),
    ]
    assert parity.value < 1e-5 < parity.limit < 1e-3

    (file,), key = Folder(out / "hf").weight_files("text_encoder"), "text_model.final_layer_norm.weight"
    weight = read_tensor(Folder(out / "hf").entries("text_encoder")[key])
    patch_file(file, file, {key: lambda: -weight})
    assert failed(folder, out / "hf").keys() == {"openvino/parity/text_encoder"}
    write_report(out, "openvino")
    flip((folder / "text_encoder" / FILE).with_suffix(".bin"))
    assert failed(out)["openvino/files"].endswith("changed: text_encoder/openvino_model.bin")


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_the_precision_of_weights_is_read_from_the_file(out: Path, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("openvino")
    from erasec.targets.ov import convert

    convert(out / "onnx" / "text_encoder" / "model.onnx", tmp_path / "x.xml", weights)
    assert weight_precision(tmp_path / "x.xml") == weights
    if weights != "int8":
        write_onnx(Folder(out / "hf"), tmp_path / "onnx", weights, ("text_encoder",))
        assert weight_precision(tmp_path / "onnx" / "text_encoder" / "model.onnx") == weights


def test_a_model_repository_is_run_and_compared(
    out: Path, variant: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasec.targets.triton import scalars_to_vectors

    names = ("text_encoder", "unet")
    monkeypatch.setattr("erasec.commands.check.NAMES", names)
    folder = tmp_path / "triton"
    shutil.copytree(out / "onnx", folder / "client", ignore=shutil.ignore_patterns("model.*", MANIFEST))
    shutil.copy(out / "onnx" / "model_index.json", folder / "client")
    for name in names:
        shutil.copytree(out / "onnx" / name, folder / "models" / name / "2", ignore=shutil.ignore_patterns("*.json"))
        scalars_to_vectors(folder / "models" / name / "2" / "model.onnx")
    results = examine(folder, out / "hf").checks
    assert [(check.name, check.passed) for check in results] == [
        (f"triton/{kind}/{name}/2", True) for kind in ("finite", "parity") for name in names
    ]
    assert failed(folder, variant("b").folder).keys() == {"triton/parity/unet/2"}


@pytest.mark.usefixtures("files_only")
def test_the_command_prints_a_table_or_json_and_has_exit_codes(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["check", *map(str, arguments)])

    result = run(out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "outcome", "value", "limit", "how"]
    assert [line.split()[:2] for line in lines[1:]] == [["hf/files", "passed"], ["onnx/files", "passed"]]

    flip(out / "onnx" / "unet" / BASE)
    result = run(out, "--json")
    assert result.exit_code == CHECK_FAILED
    by_name = {check["name"]: check for check in json.loads(result.stdout)}
    assert (by_name["hf/files"]["passed"], by_name["onnx/files"]["passed"]) == (True, False)
    assert "1 of 2 checks failed: onnx/files" in result.stderr

    (out / "onnx" / MANIFEST).write_text("{")
    result = run(out / "onnx", "--json")
    assert result.exit_code == CHECK_FAILED
    assert json.loads(result.stdout)[0]["value"] is None  # JSON has no infinity

    def lacking(*_: object) -> Any:
        raise MissingTool("the backend needs a library")

    monkeypatch.setattr("erasec.commands.check._files", lacking)
    assert run(out).exit_code == TOOL_MISSING
    assert run(tmp_path / "nothing").exit_code == 2


def test_an_onnx_folder_is_checked_without_torch(out: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli.app import app\n"
        "done = CliRunner().invoke(app, ['check', *sys.argv[1:]])\n"
        "print(done.exit_code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(out / "onnx")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_small_inputs_have_the_width_of_the_model(out: Path) -> None:
    by_name = {name: small_inputs("onnx", out / "onnx", name) for name in GRAPHS}
    shapes = {name: {key: value.shape for key, value in given.items()} for name, given in by_name.items()}
    assert shapes["text_encoder"] == {"input_ids": (1, 77)}
    assert by_name["text_encoder"]["input_ids"].dtype == np.int64
    assert shapes["unet"] == {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 77, 128), "timestep": ()}
    assert shapes["vae_encoder"] == {"sample": (1, 3, 64, 64)}
    again = small_inputs("onnx", out / "onnx", "unet")
    assert all(np.array_equal(again[key], value) for key, value in by_name["unet"].items())
    assert Folder(out / "onnx").config("unet")["cross_attention_dim"] == 128
