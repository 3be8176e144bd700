"""``erasec check``: passes what a build wrote, finds a byte that flipped in any file of it, and says what it lacks."""

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
from typer.testing import CliRunner

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import FLOATS, patch, read_header, read_tensor
from erasec.cli import app as cli
from erasec.commands import check as checks
from erasec.errors import CHECK_FAILED, TOOL_MISSING, CheckFailed, ErasecError, MissingTool
from erasec.graphs import link as linker
from erasec.graphs import weights as initializers
from erasec.graphs.link import BASE, EDITED, MANIFEST
from erasec.reporting import collect as facts
from erasec.tensorrt import engines

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def out(variant: Callable[[str], Any], tmp_path: Path) -> Path:
    """What a build leaves, for a test to damage: the checkpoint, its ONNX folder, and the report that tells of both."""
    made, out = variant("a"), tmp_path / "out"
    shutil.copytree(made.folder, out / "hf")
    shutil.copytree(made.onnx, out / "onnx")
    tell(out, "hf", "onnx")
    return out


def tell(out: Path, *names: str) -> None:
    written = []
    for name in names:
        files = facts.written(name, out / name).files
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
    return {check.name: check.how for check in checks.examine(folder, against).checks if not check.passed}


@pytest.fixture
def files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run", "_compared", "_finite"):
        monkeypatch.setattr(checks, name, lambda *_: ())


def test_a_build_passes(out: Path) -> None:
    found = checks.examine(out)
    assert {check.name for check in found.checks if not check.passed} == set()
    assert {check.name for check in found.checks} == {
        "hf/files", "hf/finite/text_encoder", "hf/finite/unet", "hf/finite/vae", "onnx/files",
        *(f"onnx/{kind}/{name}" for kind in ("finite", "weights", "parity") for name in linker.NAMES),
    }  # fmt: skip
    assert found.missing == ()
    checks.judge(found, out)


@pytest.mark.usefixtures("files_only")
@pytest.mark.parametrize("name", [
    "hf/model_index.json", f"hf/{WEIGHTS}", "hf/unet/config.json", "hf/tokenizer/vocab.json", f"onnx/{MANIFEST}",
    "onnx/model_index.json", "onnx/scheduler/scheduler_config.json", "onnx/tokenizer/merges.txt",
    "onnx/text_encoder/config.json", "onnx/unet/model.onnx", f"onnx/unet/{BASE}", f"onnx/unet/{EDITED}",
    f"onnx/vae_decoder/{BASE}",
])  # fmt: skip
def test_one_bit_in_any_file_of_a_build_is_found(out: Path, name: str) -> None:
    assert failed(out) == {}
    flip(out / name)
    target, file = name.split("/", 1)
    (found,) = failed(out).items()
    assert found[0] == f"{target}/files"
    assert f"{file} is another file" in found[1]
    with pytest.raises(CheckFailed, match=f"1 of 2 checks failed: {target}/files"):
        checks.judge(checks.examine(out), out)


@pytest.mark.usefixtures("files_only")
@pytest.mark.parametrize("name", [
    "model_index.json", "tokenizer/vocab.json", "unet/config.json", "unet/model.onnx", f"unet/{BASE}", f"unet/{EDITED}",
    f"text_encoder/{BASE}",
])  # fmt: skip
def test_an_onnx_folder_alone_tells_of_its_files_too(out: Path, tmp_path: Path, name: str) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    assert failed(alone) == {}
    flip(alone / name)
    assert f"{name} is another file" in failed(alone)["onnx/files"]


@pytest.mark.usefixtures("files_only")
def test_files_that_are_gone_or_new_are_told(out: Path) -> None:
    (out / "onnx" / "tokenizer" / "vocab.json").unlink()
    (out / "hf" / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    found = failed(out)
    assert "tokenizer/vocab.json is gone" in found["onnx/files"]
    assert "diffusion_pytorch_model.fp16.safetensors is not of the build" in found["hf/files"]


@pytest.mark.usefixtures("files_only")
def test_a_target_that_was_left_at_home_is_not_missed(out: Path) -> None:
    shutil.rmtree(out / "hf")
    assert [check.name for check in checks.examine(out).checks] == ["onnx/files"]


@pytest.mark.usefixtures("files_only")
def test_the_manifest_of_another_base_is_found(out: Path, variant: Callable[[str], Any], tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    shutil.copy(variant("b").onnx / MANIFEST, alone / MANIFEST)
    assert f"unet/{EDITED} is another file" in failed(alone)["onnx/files"]


def test_a_damaged_manifest_is_a_check_that_failed(out: Path, tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    (alone / MANIFEST).write_text("{")
    assert "is no ONNX folder" in failed(alone)["onnx/files"]


def test_another_checkpoint_is_found(out: Path, variant: Callable[[str], Any]) -> None:
    assert failed(out / "onnx", variant("b").folder).keys() == {"onnx/weights/unet", "onnx/parity/unet"}
    with pytest.raises(ErasecError, match="is no checkpoint"):
        checks.examine(out / "onnx", out)


def test_graphs_that_give_no_numbers_or_cannot_be_run_are_found(out: Path, tmp_path: Path) -> None:
    alone = Path(shutil.move(out / "onnx", tmp_path / "alone"))
    size = (alone / "text_encoder" / BASE).stat().st_size
    (alone / "text_encoder" / BASE).write_bytes(np.full(size // 4, np.nan, np.float32).tobytes())
    os.truncate(alone / "vae_decoder" / "model.onnx", 5000)
    os.truncate(alone / "unet" / EDITED, 100)
    found = failed(alone)
    assert found.keys() == {"onnx/files", "onnx/finite/text_encoder", "onnx/finite/unet", "onnx/finite/vae_decoder"}
    assert "last_hidden_state has" in found["onnx/finite/text_encoder"]
    for name in ("unet", "vae_decoder"):
        assert "it cannot be run" in found[f"onnx/finite/{name}"]
        assert str(alone) not in found[f"onnx/finite/{name}"]


def test_weights_that_are_no_numbers_are_found(out: Path) -> None:
    file = out / "hf" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    assert failed(out / "hf").keys() == {"hf/finite/unet"}


def test_without_a_library_what_needs_none_is_checked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = checks.examine(out / "onnx")
    assert [(check.name, check.passed) for check in found.checks] == [("onnx/files", True)]
    with pytest.raises(MissingTool, match="onnxruntime"):
        checks.judge(found, out)
    flip(out / "onnx" / "model_index.json")
    with pytest.raises(CheckFailed):  # which is the worse of the two
        checks.judge(checks.examine(out / "onnx"), out)


def test_what_is_no_build_is_told(tmp_path: Path, out: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ErasecError, match="is no build and no target's folder"):
            checks.examine(folder)
    (out / "report.json").write_text('{"written": 1}')
    with pytest.raises(ErasecError, match=r"report\.json is damaged"):
        checks.examine(out)


@pytest.mark.usefixtures("files_only")
def test_a_target_that_only_the_report_knows_is_compared_too(out: Path) -> None:
    (out / "ldm").mkdir()
    (out / "ldm" / "model.safetensors").write_bytes(bytes(1000))
    tell(out, "hf", "onnx", "ldm")
    assert failed(out) == {}
    flip(out / "ldm" / "model.safetensors")
    assert "model.safetensors is another file" in failed(out)["ldm/files"]


def test_a_checkpoint_is_compared_with_another(
    out: Path, variant: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out / "hf")
    found = checks.examine(Path(), variant("a").folder).checks
    assert {check.name: check.passed for check in found}["hf/same"] is True
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
    patch(chosen, file, {key: partial(torch.zeros_like, read_tensor(entry))
                         for key, entry in read_header(chosen)[0].items() if entry.dtype in FLOATS})  # fmt: skip
    assert failed(out / "onnx", out / "hf") == {}


@pytest.fixture
def built(out: Path, tmp_path: Path) -> Path:
    """A folder of engines, which are no programs here."""
    folder = tmp_path / "engines"
    shutil.copytree(out / "onnx", folder, ignore=shutil.ignore_patterns("model.*", MANIFEST))
    shapes = {"text_encoder": {"input_ids": (2, 77)}, "vae_decoder": {"latent_sample": (1, 4, 8, 8)},
              "unet": {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 128)}}  # fmt: skip
    entries = {}
    for name, inputs in shapes.items():
        (folder / name / engines.ENGINE).write_bytes(name.encode() * 1000)
        profile = {key: [shape] * 3 for key, shape in inputs.items()}
        entries[name] = engines.entry(folder / name / engines.ENGINE, ("graph", "weights"), profile, 1.0)
    engines.write_record(folder, engines.Builder(engines.RTX, ("89",)), "1.7.0.0", entries)
    return folder


def entries(folder: Path) -> list[str]:
    return list(engines.read_record(folder)["components"])


def told(folder: Path, source: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The record of a folder of engines, were they built from what has these digests."""
    record = engines.read_record(folder)
    for name, (graph, weights) in source.items():
        record["components"][name] |= {"graph": graph, "weights": weights, "precision": "fp32"}
    return record


def test_engines_are_compared_with_their_record_and_this_machine(
    built: Path, variant: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "require", lambda _: None)
    monkeypatch.setattr(engines, "version", lambda _: "1.7.0.0")
    monkeypatch.setattr(engines, "devices", list)
    found = checks.examine(built)
    assert [(check.name, check.passed) for check in found.checks] == [("trt-rtx/files", True)]
    with pytest.raises(MissingTool, match="do not run on this machine"):
        checks.judge(found, built)
    monkeypatch.setattr(engines, "devices", lambda: [("another", "75")])
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
    monkeypatch.setattr(engines, "devices", lambda: [("this", "89")])
    assert failed(built).keys() == {"trt-rtx/finite/unet"}
    assert seen["unet"] == {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, 128), "timestep": ()}
    assert seen["text_encoder"] == {"input_ids": (2, 77)}

    source = {
        name: initializers.digests(built.parent / "out" / "onnx" / name / "model.onnx") for name in entries(built)
    }
    engines.rewrite_record(built, told(built, source))
    assert failed(built, built.parent / "out" / "hf").keys() == {"trt-rtx/finite/unet"}
    assert failed(built, variant("b").folder).keys() == {"trt-rtx/finite/unet", "trt-rtx/source/unet"}

    flip(built / "unet" / engines.ENGINE)
    assert {"trt-rtx/files", "trt-rtx/here"} <= failed(built).keys()
    (built / engines.RECORD).write_text("{")
    assert all("is no folder of engines" in how for how in failed(built).values())


def test_openvino_is_run_and_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from erasec.targets.ov import FILE, convert

    monkeypatch.setattr(checks, "NAMES", ("text_encoder",))
    folder = out / "openvino"
    shutil.copytree(out / "onnx", folder, ignore=shutil.ignore_patterns("model.onnx*", "model.edited*", MANIFEST))
    (folder / "unet" / FILE).touch()  # by which the folder is known; it is not run here
    convert(out / "onnx" / "text_encoder" / "model.onnx", folder / "text_encoder" / FILE)
    finite, parity = checks.examine(folder, out / "hf").checks
    assert [(check.name, check.passed) for check in (finite, parity)] == [
        ("openvino/finite/text_encoder", True), ("openvino/parity/text_encoder", True),
    ]  # fmt: skip
    assert parity.value < 1e-5 < parity.limit < 1e-3

    (file,), key = Folder(out / "hf").weight_files("text_encoder"), "text_model.final_layer_norm.weight"
    weight = read_tensor(Folder(out / "hf").entries("text_encoder")[key])
    patch(file, file, {key: lambda: -weight})
    assert failed(folder, out / "hf").keys() == {"openvino/parity/text_encoder"}
    tell(out, "openvino")
    flip((folder / "text_encoder" / FILE).with_suffix(".bin"))
    assert failed(out)["openvino/files"].endswith("openvino_model.bin is another file")


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_how_weights_are_stored_is_seen(out: Path, tmp_path: Path, weights: str) -> None:
    pytest.importorskip("openvino")
    from erasec.targets.ov import convert

    convert(out / "onnx" / "text_encoder" / "model.onnx", tmp_path / "x.xml", weights)
    assert checks._stored(tmp_path / "x.xml") == weights
    if weights != "int8":
        linker.write(Folder(out / "hf"), tmp_path / "onnx", weights, ("text_encoder",))
        assert checks._stored(tmp_path / "onnx" / "text_encoder" / "model.onnx") == weights


def test_a_model_repository_is_run_and_compared(
    out: Path, variant: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasec.targets.triton import lined_up

    names = ("text_encoder", "unet")
    monkeypatch.setattr(checks, "NAMES", names)
    folder = tmp_path / "triton"
    shutil.copytree(out / "onnx", folder / "client", ignore=shutil.ignore_patterns("model.*", MANIFEST))
    shutil.copy(out / "onnx" / "model_index.json", folder / "client")
    for name in names:
        shutil.copytree(out / "onnx" / name, folder / "models" / name / "2", ignore=shutil.ignore_patterns("*.json"))
        lined_up(folder / "models" / name / "2" / "model.onnx")
    found = checks.examine(folder, out / "hf").checks
    assert [(check.name, check.passed) for check in found] == [
        (f"triton/{kind}/{name}/2", True) for kind in ("finite", "parity") for name in names
    ]
    assert failed(folder, variant("b").folder).keys() == {"triton/parity/unet/2"}


@pytest.mark.usefixtures("files_only")
def test_the_command_says_it_in_a_table_in_json_and_by_its_exit_code(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, ["check", *map(str, arguments)])

    found = run(out)
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["check", "outcome", "value", "limit", "how"]
    assert [line.split()[:2] for line in lines[1:]] == [["hf/files", "passed"], ["onnx/files", "passed"]]

    flip(out / "onnx" / "unet" / BASE)
    found = run(out, "--json")
    assert found.exit_code == CHECK_FAILED
    told = {each["name"]: each for each in json.loads(found.stdout)}
    assert (told["hf/files"]["passed"], told["onnx/files"]["passed"]) == (True, False)
    assert "1 of 2 checks failed: onnx/files" in found.stderr

    (out / "onnx" / MANIFEST).write_text("{")
    found = run(out / "onnx", "--json")
    assert found.exit_code == CHECK_FAILED
    assert json.loads(found.stdout)[0]["value"] is None  # JSON has no infinity

    def lacking(*_: object) -> Any:
        raise MissingTool("the backend needs a library")

    monkeypatch.setattr(checks, "_files", lacking)
    assert run(out).exit_code == TOOL_MISSING
    assert run(tmp_path / "nothing").exit_code == 2


def test_an_onnx_folder_is_checked_without_torch(out: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli import app as cli\n"
        "done = CliRunner().invoke(cli.app, ['check', *sys.argv[1:]])\n"
        "print(done.exit_code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(out / "onnx")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_inputs_are_small_and_of_the_models_own_width(out: Path) -> None:
    found = {name: checks.inputs("onnx", out / "onnx", name) for name in linker.NAMES}
    shapes = {name: {key: value.shape for key, value in given.items()} for name, given in found.items()}
    assert shapes["text_encoder"] == {"input_ids": (1, 77)}
    assert found["text_encoder"]["input_ids"].dtype == np.int64
    assert shapes["unet"] == {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 77, 128), "timestep": ()}
    assert shapes["vae_encoder"] == {"sample": (1, 3, 64, 64)}
    again = checks.inputs("onnx", out / "onnx", "unet")
    assert all(np.array_equal(again[key], value) for key, value in found["unet"].items())
    assert Folder(out / "onnx").config("unet")["cross_attention_dim"] == 128
