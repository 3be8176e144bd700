"""Relinking: the edit in an ONNX folder is replaced, byte by byte, completely or not at all, and only if it fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from erasec.base import Context
from erasec.checkpoint import manifest, staging
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor
from erasec.checkpoint.sealed import DIGEST, save_sealed
from erasec.cli.app import app
from erasec.commands.apply import relink as relink_from_base
from erasec.commands.relink import relink
from erasec.errors import ErasecError
from erasec.graphs.link import EDITED, write_onnx
from erasec.graphs.manifest import MANIFEST
from erasec.graphs.parity import compare_weights
from erasec.model import edit_file, loading
from erasec.model.edit import Dense, Edit
from erasec.model.memory import Memory
from erasec.targets.edit_file import EditFile

onnx = pytest.importorskip("onnx")
APART = f"unet/{EDITED}"


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files except the manifest of a copy."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if name != manifest.FILE}


def inodes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def a(variant: Callable[[str], Any]) -> Any:
    return variant("a")


@pytest.fixture
def b(variant: Callable[[str], Any]) -> Any:
    return variant("b")


@pytest.fixture
def folder(a: Any, tmp_path: Path) -> Path:
    """A copy of the first variant's ONNX folder, to change."""
    return Path(shutil.copytree(a.onnx, tmp_path / "onnx"))


def test_there_and_back_gives_the_same_bytes(a: Any, b: Any, folder: Path) -> None:
    before, files = contents(folder), inodes(folder)
    done = relink(folder, b.edit)
    assert (done.path, done.tensors) == (folder, 14)
    assert done.bytes == (folder / APART).stat().st_size
    assert contents(folder) == contents(b.onnx)
    changed = {name for name, content in contents(folder).items() if content != before[name]}
    assert changed == {APART, MANIFEST}
    after = inodes(folder)
    assert {name for name in after if after[name] != files[name]} == {APART, MANIFEST}
    assert all(check.passed for check in compare_weights(Folder(b.folder), folder))
    assert not all(check.passed for check in compare_weights(Folder(a.folder), folder))
    relink(folder, a.edit)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["onnx"]


def test_a_copy_leaves_the_folder_as_it_is(a: Any, b: Any, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    relink(folder, b.edit, tmp_path / "copied")
    relink(folder, b.edit, tmp_path / "linked", hard=True)
    assert contents(folder) == before
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked") == contents(b.onnx)
    own, copied, linked = inodes(folder), inodes(tmp_path / "copied"), inodes(tmp_path / "linked")
    assert {name for name in own if own[name] == linked[name]} == set(own) - {APART, MANIFEST}
    assert not set(own.values()) & set(copied.values())


def differences(root: Path) -> tuple[str, ...]:
    return manifest.compare(root, manifest.read(root)[0]).all


def test_a_copy_has_a_manifest_of_all_its_files_and_keeps_it(a: Any, b: Any, folder: Path, tmp_path: Path) -> None:
    relink(folder, b.edit, tmp_path / "copy")
    content, _ = manifest.read(tmp_path / "copy")
    assert content.files.keys() == contents(b.onnx).keys() and differences(tmp_path / "copy") == ()
    relink(tmp_path / "copy", a.edit)
    assert differences(tmp_path / "copy") == ()
    assert manifest.read(tmp_path / "copy")[0].renewed == (MANIFEST, APART)
    assert not (folder / manifest.FILE).exists()


def test_the_manifest_of_a_build_follows_a_relink_and_still_tells_what_else_changed(b: Any, folder: Path) -> None:
    (folder.parent / "README.md").write_text("the card")
    manifest.write(folder.parent)
    (folder / "tokenizer" / "merges.txt").write_text("damaged before")
    relink(folder, b.edit)
    assert differences(folder.parent) == ("onnx/tokenizer/merges.txt",)
    (folder.parent / manifest.FILE).write_text("{}")
    before = contents(folder)
    with pytest.raises(ErasecError, match="is damaged"):
        relink(folder, b.edit)
    assert contents(folder) == before


def test_where_the_file_system_has_no_links_files_are_copied(
    b: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    relink(folder, b.edit, tmp_path / "linked", hard=True)
    assert not set(inodes(folder).values()) & set(inodes(tmp_path / "linked").values())
    relink(folder, b.edit)
    assert contents(folder) == contents(tmp_path / "linked") == contents(b.onnx)


def test_an_edit_without_tensors_takes_them_from_the_base(
    a: Any, b: Any, folder: Path, random_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ErasecError, match="does not hold the tensors") as caught:
        relink(folder, b.plain)
    assert "--model MODEL" in caught.value.fix
    assert contents(folder) == contents(a.onnx)
    relink_from_base(folder, b.plain, None, str(random_folder))
    assert contents(folder) == contents(b.onnx)


class Stopped(BaseException):
    """What a killed process raises."""


@pytest.mark.parametrize("at", ["data", "manifest", "put"])
def test_stopped_in_the_middle_the_old_is_whole(b: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    before = contents(folder)
    if at == "put":
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
        real, calls = os.rename, []

        def once(source: Path, target: Path) -> None:
            calls.append(target)
            if target == folder and calls.count(folder) == 1:
                raise Stopped
            real(source, target)

        monkeypatch.setattr(staging.os, "rename", once)
    else:
        function = {"data": "write_data", "manifest": "write_manifest"}[at]
        monkeypatch.setattr(f"erasec.commands.relink.{function}", stop)
    with pytest.raises(Stopped):
        relink(folder, b.edit)
    monkeypatch.undo()
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["onnx"]


def test_killed_between_two_names_the_next_run_finds_the_old(a: Any, b: Any, folder: Path, tmp_path: Path) -> None:
    with staging.output(folder) as own:
        folder.rename(own.work / "old")
        shutil.copytree(own.work, tmp_path / "killed")
        (own.work / "old").rename(folder)
    shutil.rmtree(folder)
    (tmp_path / "killed").rename(own.work)
    relink(folder, b.edit)
    assert contents(folder) == contents(b.onnx)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["onnx"]


def test_another_base_is_refused(b: Any, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    key = min(manifest["base"])
    manifest["base"][key] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    before = contents(folder)
    with pytest.raises(ErasecError, match="is for another base than") as caught:
        relink(folder, b.edit)
    assert key in caught.value.why
    assert contents(folder) == before


def test_other_tensors_are_refused(folder: Path, random_folder: Path, tmp_path: Path) -> None:
    base = loading.load(str(random_folder))
    site = next(site for site in base.select("cross", "kv"))
    edited = base.with_edit(Edit({site: Dense(torch.ones(site.shape))}, "by hand", ("c",), ""))
    EditFile(tensors=True).export(edited, tmp_path / "edit", Context())
    with pytest.raises(ErasecError, match="changes other tensors than") as caught:
        relink(folder, next((tmp_path / "edit").iterdir()))
    assert "is only in the folder" in caught.value.why


def test_a_folder_without_edited_tensors_is_refused(b: Any, random_folder: Path, tmp_path: Path) -> None:
    write_onnx(Folder(random_folder), tmp_path / "plain")
    with pytest.raises(ErasecError, match="changes other tensors than") as caught:
        relink(tmp_path / "plain", b.edit)
    assert f"is only in {b.edit.name}" in caught.value.why


def test_extras_are_refused(a: Any, b: Any, folder: Path, tmp_path: Path) -> None:
    rows, about = torch.ones(2, 192), {"model": "m", "family": "sd1", "sites": {}}
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", rows, rows)
    edit_file.write_edits(tmp_path / "memory", [Edit({}, "by hand", ("c",), "", memories=(memory,))], about)
    with pytest.raises(ErasecError, match="memory is more than changes of weights"):
        relink(folder, tmp_path / "memory")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["carried"] == []
    (folder / MANIFEST).write_text(json.dumps(manifest | {"carried": ["negative"]}))
    with pytest.raises(ErasecError, match="is more than weights") as caught:
        relink(folder, b.edit)
    assert "it carries negative" in caught.value.why


def test_a_link_stays_a_link_and_what_it_points_to_is_changed(b: Any, folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to("onnx")
    (folder / "model_index.json").rename(folder / "blob")
    (folder / "model_index.json").symlink_to("blob")
    assert relink(link, b.edit).path == link
    assert link.is_symlink()
    assert {**contents(b.onnx), "blob": contents(b.onnx)["model_index.json"]} == contents(folder)


def test_a_folder_that_somebody_stands_in_is_not_replaced(
    a: Any, b: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "unet")
    with pytest.raises(ErasecError, match="holds the working directory"):
        relink(Path(".."), b.edit)
    with pytest.raises(ErasecError, match="lies in"):
        relink(Path(".."), b.edit, Path("copy"))
    assert contents(folder) == contents(a.onnx)
    relink(Path(".."), b.edit, folder.with_name("copy"))
    assert contents(folder.with_name("copy")) == contents(b.onnx)


def test_the_command_notes_that_the_rest_of_the_build_is_unchanged(b: Any, folder: Path) -> None:
    note = "still describe the old edit"
    done = CliRunner().invoke(app, ["relink", str(folder), str(b.edit)])
    assert (done.exit_code, note in done.stderr) == (0, False)
    (folder.parent / "report.json").touch()
    assert note in CliRunner().invoke(app, ["relink", str(folder.parent), str(b.edit)]).stderr
    copied = ["relink", str(folder), str(b.edit), "--out", str(folder.with_name("copy"))]
    assert note not in CliRunner().invoke(app, copied).stderr


@pytest.mark.parametrize("damage", ["gone", "nan"])
def test_a_damaged_edit_is_an_error(a: Any, b: Any, folder: Path, tmp_path: Path, damage: str) -> None:
    entries, metadata = read_header(b.edit)
    tensors = {key: read_tensor(entry) for key, entry in entries.items()}
    name = min(key for key in tensors if key.startswith(edit_file.MERGED))
    if damage == "gone":
        del tensors[name]
    else:
        tensors[name].view(-1)[0] = float("nan")
    del metadata[DIGEST]
    save_sealed(tmp_path / "x.edit.safetensors", tensors, metadata)
    words = {"gone": "is damaged", "nan": f"{name.removeprefix(edit_file.MERGED)} is not finite"}
    with pytest.raises(ErasecError, match=words[damage]):
        relink(folder, tmp_path / "x.edit.safetensors")
    assert contents(folder) == contents(a.onnx)
    data = bytearray(b.edit.read_bytes())
    data[-1] ^= 1
    (tmp_path / "x.edit.safetensors").write_bytes(data)
    with pytest.raises(ErasecError, match="is damaged"):
        relink(folder, tmp_path / "x.edit.safetensors")
    assert contents(folder) == contents(a.onnx)


def test_other_files_and_folders_are_errors(a: Any, b: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no edit file"):
        relink(folder, tmp_path / "nothing")
    (weights,) = Folder(a.folder).weight_files("unet")
    with pytest.raises(ErasecError, match="is no edit file of erasec"):
        relink(folder, weights)
    (tmp_path / "damaged").write_bytes(b.edit.read_bytes()[:5000])
    with pytest.raises(ErasecError):
        relink(folder, tmp_path / "damaged")
    with pytest.raises(ErasecError, match="is no ONNX folder of erasec"):
        relink(a.folder, b.edit)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ErasecError, match="full exists"):
        relink(folder, b.edit, tmp_path / "full")
    assert contents(folder) == contents(a.onnx)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
def test_the_process_needs_no_torch_and_little_memory(b: Any, folder: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from erasec.cli.app import app\n"
        "done = CliRunner().invoke(app, ['relink', *sys.argv[1:]]); print(done.stdout)\n"
        "print(done.exit_code, sorted({'torch', 'onnx', 'diffusers'} & set(sys.modules)))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(folder), str(b.edit)]
    lines = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout.split("\n")
    assert lines[0] == str(folder)
    assert lines[1].startswith("changed 14 tensors")
    assert lines[-3] == "0 []"
    assert int(lines[-2]) < 300_000
    assert contents(folder) == contents(b.onnx)
