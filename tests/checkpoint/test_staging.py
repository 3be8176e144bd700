"""Outputs appear whole or not at all, one command writes each, and what kills left behind is cleaned up."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint import owned, staging
from erasec.checkpoint.safetensors import atomic_write
from erasec.checkpoint.staging import NAME_BYTES, file_name, output, settle, settle_all, work_folder
from erasec.errors import ErasecError


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["star", "golf ball"], "star-golf-ball"),
        (["AC/DC logo"], "AC-DC-logo"),
        (["../x"], "x"),
        (["/x", "..", "///"], "x"),
        ([".hidden", "v1.4"], "hidden-v1.4"),
        (["///"], ""),
    ],
)
def test_file_names_stay_in_their_folder(words: list[str], name: str) -> None:
    assert file_name(words) == name


def test_file_names_are_cut_by_bytes() -> None:
    assert file_name(["\u732b" * 80]) == "\u732b" * (NAME_BYTES // 3)
    assert file_name(["a" * 119, "b"]) == "a" * 119


def write(out: Path, text: str) -> None:
    with output(out) as own:
        (own.new_folder() / "file").write_text(text)
        own.publish()


def killed(out: Path, code: str) -> None:
    """Run ``code``, in which ``own`` is the Output of ``out``, in a process that then kills itself."""
    script = (
        "import os, sys; from pathlib import Path; from erasec.checkpoint import staging, disk\n"
        f"with staging.output(Path({str(out)!r})) as own:\n"
        f"    {code}\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9


@pytest.fixture(params=[True, False], ids=["exchange", "no-exchange"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """File systems that exchange two folders at once, and others."""
    if not request.param:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    return bool(request.param)


@pytest.mark.usefixtures("exchange")
def test_the_new_replaces_the_old_and_nothing_else_is_left(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


@pytest.mark.usefixtures("exchange")
def test_at_no_system_call_is_there_neither_the_old_nor_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before each call that renames or removes: the next command finds the old or the new, and nothing else."""

    class Killed(BaseException):
        pass

    out, calls, seen = tmp_path / "out", ("rename", "replace", "rmdir", "unlink"), set[str]()
    for budget in range(20):
        write(out, "old")
        done: list[str] = []
        with monkeypatch.context() as patched:

            def counted(real: Callable[..., Any], done: list[str] = done, budget: int = budget) -> Callable[..., Any]:
                def call(*given: object, **more: object) -> Any:
                    done.append("")
                    if len(done) > budget:
                        raise Killed
                    return real(*given, **more)

                return call

            own = None
            try:
                with output(out) as own:
                    (own.new_folder() / "file").write_text("new")
                    for name in calls:
                        patched.setattr(os, name, counted(getattr(os, name)))
                    patched.setattr(staging, "exchange", counted(staging.exchange))
                    own.publish()
            except Killed:
                pass
        assert own is not None
        settle(out)
        seen.add((out / "file").read_text())
        assert os.listdir(tmp_path) == ["out"]
    assert seen == {"old", "new"}


def test_a_kill_between_two_names_is_settled_by_the_next_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    killed(out, "os.rename(own.path, own.work / 'old'); own.new_folder()")
    assert not out.exists()
    settle(out / "hf")  # a path in the output is enough
    assert (out / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_what_is_half_removed_is_never_restored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    killed(out, "own.new_folder(); disk.exchange(own.stage, own.path); os.rename(own.stage, own.work / 'trash')")
    (out / ".keep").touch()
    (out / ".keep").unlink()
    out.rmdir()  # the user removes what is there now
    settle(out)
    assert os.listdir(tmp_path) == []


def test_a_stage_of_a_killed_command_is_removed_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(out, "(own.new_folder() / 'big').touch()")
    assert (work_folder(out) / "stage" / "big").exists()
    settle_all([tmp_path / "out"], [])
    assert os.listdir(tmp_path) == []
    with output(out) as own:
        own.new_folder()
        settle(out)
        assert own.stage.is_dir()


@pytest.mark.parametrize("kept", ["stage", "lock/x", "owner.json"])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, kept: str) -> None:
    """A user's own files next to the output, even under the names of the working folder and of earlier versions."""
    own_files = [".out.erasec/mine", f".out.erasec/{kept}", ".out.old/mine", ".out.training/mine", ".out.x1y2/mine"]
    for name in own_files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    settle(tmp_path / "out")
    with pytest.raises(ErasecError, match=r"\.out\.erasec is in the way"):
        write(tmp_path / "out", "new")
    assert all((tmp_path / name).read_text() == "mine" for name in own_files)
    (tmp_path / ".out.erasec").rename(tmp_path / "elsewhere")
    write(tmp_path / "out", "new")
    assert all((tmp_path / name).read_text() == "mine" for name in own_files[2:])


def test_one_command_writes_an_output_and_the_second_says_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, time; from pathlib import Path; from erasec.checkpoint.staging import output\n"
        f"sys.argv[1:] = ['build', 'a model']\nwith output(Path({str(tmp_path / 'out')!r})): print('in', flush=True); "
        "time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    for out in ("out", "out/onnx", "."):
        started = time.monotonic()
        with pytest.raises(ErasecError, match="another command is writing there") as caught:
            write(tmp_path / out, "second")
        assert time.monotonic() - started < 10
        assert f"process {first.pid}" in caught.value.why and "erasec build 'a model'" in caught.value.why
        assert caught.value.where == str(tmp_path / "out")
    first.kill()
    first.wait()
    write(tmp_path / "out", "second")
    assert os.listdir(tmp_path) == ["out"]


def test_with_fresh_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write(tmp_path / "folder", "old")
    for name in ("file", "folder"):
        with pytest.raises(ErasecError, match=r"exists|is not empty"), output(tmp_path / name, fresh=True):
            pass
    (tmp_path / "empty").mkdir()
    with output(tmp_path / "empty", fresh=True) as own:
        (own.new_folder() / "file").touch()
        own.publish()
    assert os.listdir(tmp_path / "empty") == ["file"]


def test_a_link_is_followed_and_a_link_to_nothing_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    with pytest.raises(ErasecError, match="is a link to disk/out, which is not there"):
        write(tmp_path / "link", "new")
    assert os.listdir(tmp_path / "disk") == []
    write(tmp_path / "disk" / "out", "old")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "file").read_text() == "new"


def test_a_mounted_folder_is_refused() -> None:
    with pytest.raises(ErasecError, match="a disk is mounted at /proc"):
        staging.check_place(Path("/proc"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ErasecError, match="nothing can be written in") as caught:
        write(tmp_path / "out", "new")
    assert caught.value.why == "Permission denied"


def test_an_error_leaves_neither_a_stage_nor_new_parents(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output(tmp_path / "a" / "b" / "out") as own:
        (own.new_folder() / "missing" / "file").touch()
    assert os.listdir(tmp_path) == []


def test_training_stays_until_the_output_is_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(out, "own.training.mkdir(); (own.training / 'state').touch(); (own.training / '.state.0123').touch()")
    settle(out)
    assert [path.name for path in staging.training_folder(out).iterdir()] == ["state"]
    write(out, "new")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_modes_follow_the_umask_and_work_in_progress_is_private(
    tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    before = os.umask(umask)
    try:
        with output(tmp_path / "out") as own:
            private = stat.S_IMODE(own.work.stat().st_mode)
            with atomic_write(own.new_folder() / "unet" / "file") as temporary:
                temporary.write_text("x")
            own.publish()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE((tmp_path / "out" / path).stat().st_mode) for path in (".", "unet", "unet/file")}
    assert modes == {".": folder, "unet": folder, "unet/file": file} and private == 0o700


def test_everything_is_on_the_disk_before_the_old_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    events: list[str] = []
    fsync, swap = os.fsync, staging.exchange

    def synced(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def swapped(a: Path, b: Path) -> bool:
        events.append("swap")
        return swap(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(staging, "exchange", swapped)
    write(tmp_path / "out", "new")
    assert events == ["file", "stage", "swap", tmp_path.name]


class TestScratch:
    """Folders for temporary files that end with their process, however it ends."""

    def test_that_of_a_killed_process_is_swept_and_others_stay(self, tmp_path: Path) -> None:
        script = (
            "import os; from pathlib import Path; from erasec.checkpoint import owned\n"
            "(owned.process_scratch() / 'big').touch(); print(owned.process_scratch(), flush=True)\n"
        )
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        run = [sys.executable, "-c", f"{script}os.kill(os.getpid(), {signal.SIGKILL:d})"]
        left = Path(subprocess.run(run, env=environment, capture_output=True, text=True).stdout.strip())
        assert (left / "big").exists()
        (tmp_path / "erasec-mine").mkdir()
        (tmp_path / "erasec-mine" / "lock").touch()
        (tmp_path / "erasec-mine" / "thesis").touch()
        with owned.scratch_folder(tmp_path) as running:
            owned.sweep(tmp_path)
            assert running.is_dir()
        assert os.listdir(tmp_path) == ["erasec-mine"] and len(os.listdir(tmp_path / "erasec-mine")) == 2
        ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0 and os.listdir(tmp_path) == ["erasec-mine"]

    def test_a_record_that_a_power_loss_emptied_is_still_ours(self, tmp_path: Path) -> None:
        folder = tmp_path / "erasec-1"
        (folder / "big").mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "owner.json").write_text(json.dumps({"program": "other"}))
        owned.sweep(tmp_path)
        assert folder.exists()
        (folder / "owner.json").write_text("")
        owned.sweep(tmp_path)
        assert not folder.exists()
