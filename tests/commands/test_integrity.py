"""What ``erasec check`` finds by the manifest of a build, from whichever folder or file below it the check starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from erasec.checkpoint import manifest
from erasec.checkpoint.safetensors import save_tensors
from erasec.checkpoint.sealed import save_sealed
from erasec.cli.app import app
from erasec.commands.check import examine
from erasec.errors import CHECK_FAILED, ErasecError
from erasec.reporting.collect import written_files

STARTS = (".", "hf", "hf/unet", "hf/unet/weights")


def write_report(out: Path, passed: bool = True) -> None:
    written = written_files("hf", out / "hf").files
    files = {path: {"bytes": size, "sha256": digest} for path, (size, digest) in written.items()}
    report = {"passed": passed, "written": [{"target": "hf", "path": "hf", "files": files}]}
    (out / "report.json").write_text(json.dumps(report))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A build as far as its manifest is concerned: two targets of one file each, and what lies next to them."""
    out = tmp_path / "out"
    for name in ("hf/unet/weights", "lora/weights", "report.html", "recipe.toml", "README.md"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"{name}: this is what the build wrote")
    write_report(out)
    manifest.write(out)
    return out


def failed(path: Path) -> dict[str, str]:
    return {check.name: check.how for check in examine(path).checks if not check.passed}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_whole_build_passes_from_everywhere(out: Path) -> None:
    for start in STARTS:
        names = [check.name for check in examine(out / start).checks]
        assert names == ["manifest", "files", "hf/files", "lora/files", "report"]
        assert failed(out / start) == {}
        assert examine(out / start).notes == ()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda out: flip(out / "hf/unet/weights"), "hf/files", "changed: hf/unet/weights"),
        (lambda out: (out / "hf/unet/weights").write_text("unedited"), "hf/files", "changed: hf/unet/weights"),
        (lambda out: shutil.rmtree(out / "lora"), "lora/files", "lost: lora/weights"),
        (lambda out: shutil.copytree(out / "lora", out / "more"), "more/files", "added: more/weights"),
        (lambda out: (out / "report.html").write_text("forged"), "files", "changed: report.html"),
        (lambda out: flip(out / "recipe.toml"), "files", "changed: recipe.toml"),
        (lambda out: write_report(out, passed=False), "files", "changed: report.json"),
        (lambda out: flip(out / manifest.FILE), "manifest", "is damaged"),
    ],
)
def test_every_change_is_found_from_everywhere(
    out: Path, change: Callable[[Path], object], name: str, words: str, start: str
) -> None:
    change(out)
    failures = failed(out / start)
    assert failures.keys() == {name}
    assert words in failures[name]


def test_the_report_must_agree_with_the_manifest(out: Path) -> None:
    write_report(out, passed=False)
    manifest.write(out)
    assert failed(out).keys() == {"report"} and "was rejected" in failed(out)["report"]
    write_report(out)
    (out / "hf/unet/weights").write_text("unedited")
    manifest.write(out)
    assert failed(out).keys() == {"report"} and failed(out)["report"].endswith("the first is hf/unet/weights")
    manifest.renew([out / "hf/unet/weights"])  # as relink and edits in place do
    assert failed(out) == {}


def test_long_lists_are_cut(out: Path) -> None:
    for number in range(8):
        (out / f"hf/{number}").touch()
    assert failed(out)["hf/files"].endswith("added: hf/0, hf/1, hf/2, hf/3, hf/4 and 3 more")


def test_a_folder_without_a_manifest_says_so_and_is_compared_with_its_report(out: Path) -> None:
    (out / manifest.FILE).unlink()
    (note,) = examine(out).notes
    assert f"has no {manifest.FILE}" in note
    assert [check.name for check in examine(out).checks] == ["hf/files"]
    flip(out / "hf/unet/weights")
    assert "changed: unet/weights" in failed(out)["hf/files"]
    result = CliRunner().invoke(app, ["check", str(out)])
    assert result.exit_code == CHECK_FAILED and f" note: {note}" in result.stderr


def test_a_file_alone_is_compared_with_its_own_digest(tmp_path: Path) -> None:
    file = tmp_path / "star.edit.safetensors"
    save_sealed(file, {"a": torch.ones(4)})
    assert failed(file) == {}
    flip(file)
    assert failed(file).keys() == {"content"}
    for name, save in (("plain", save_tensors), ("text", lambda path, _: path.write_text("text"))):
        write: Any = save
        write(tmp_path / name, {"a": torch.ones(4)})
        with pytest.raises(ErasecError):
            examine(tmp_path / name)
