"""Edits in place: after a kill at any byte, a power cut, or an error, a file is the old one or the new one."""

from __future__ import annotations

import fcntl
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError

Patch = Callable[[Mapping[Path, Mapping[str, Callable[[], torch.Tensor]]]], None]


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """The os module, as journal.py sees it, that dies after ``budget`` bytes and calls and remembers what no fsync
    has made safe. fsync itself is left out: it would only cost time here."""

    def __init__(self, budget: float, keeps_order: bool = True) -> None:
        self.left, self.keeps_order = budget, keeps_order
        self.names: dict[int, Path] = {}
        self.unsafe: list[tuple[Path, int, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def spend(self, wanted: int = 1) -> int:
        if self.left < 1:
            raise Killed
        granted = int(min(self.left, wanted))
        self.left -= granted
        return granted

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self.spend()
        handle = os.open(path, flags, mode)
        self.names[handle] = Path(path)
        return handle

    def pwrite(self, handle: int, data: memoryview, at: int) -> int:
        count = self.spend(len(data))
        self.unsafe.append((self.names[handle], at, os.pread(handle, count, at)))
        os.pwrite(handle, data[:count], at)
        if count < len(data):
            raise Killed
        return count

    def fsync(self, handle: int) -> None:
        self.spend()
        if self.keeps_order:
            self.unsafe = [entry for entry in self.unsafe if entry[0] != self.names[handle]]

    def unlink(self, path: Path) -> None:
        self.spend()
        os.unlink(path)

    def cut(self, draw: random.Random) -> None:
        """What a power cut does: of the writes that no fsync followed, any may be lost."""
        for path, at, old in reversed(self.unsafe):
            if path.exists() and draw.random() < 0.5:
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(old)
                    if len(old) == 0:
                        file.truncate(at)


def naive(changed: Mapping[Path, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
    """What the journal is there to prevent."""
    for file, tensors in changed.items():
        entries, _ = checkpoint.read_header(file)
        handle = journal.os.open(file, os.O_RDWR)
        for key, make in tensors.items():
            journal.os.pwrite(handle, checkpoint.tensor_bytes(make()), entries[key].start)
        os.close(handle)


def old() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0), "b": torch.arange(4).half(), "kept": torch.ones(3)}


NEW: dict[str, Callable[[], torch.Tensor]] = {
    "a": partial(torch.full, (6,), 9.0),
    "b": partial(torch.full, (4,), 7.0, dtype=torch.float16),
}


def folder(path: Path, files: int = 1) -> list[Path]:
    names = [path / f"model-{number}.safetensors" for number in range(files)]
    for name in names:
        name.write_bytes(file_bytes())
    return names


@cache
def file_bytes() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        checkpoint.save(Path(file.name), old())
        return Path(file.name).read_bytes()


def state(file: Path) -> str:
    """ "old", "new" or "mixed" by what the library loads, "" where it does not."""
    try:
        with safe_open(file, "pt") as tensors:
            found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError:
        return ""
    new = {**old(), **{key: make() for key, make in NEW.items()}}
    for name, content in (("old", old()), ("new", new)):
        if all(torch.equal(found[key], content[key]) for key in content):
            return name
    return "mixed"


def interrupted(files: list[Path], disk: Disk, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patched:
        patched.setattr(journal, "os", disk)
        try:
            patch(dict.fromkeys(files, NEW))
        except Killed:
            return True
    return False


def recover(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(journal, "os", disk)
        journal.recover(path)


def every_kill(
    tmp_path: Path, files: int, patch: Patch, monkeypatch: pytest.MonkeyPatch, step: int = 1
) -> list[tuple[set[str], set[str]]]:
    """For a kill after every ``step`` bytes or calls: what the files are before recovery, and after."""
    seen, budget, killed = [], 0, True
    while killed:
        paths = folder(tmp_path, files)
        killed = interrupted(paths, Disk(budget), patch, monkeypatch)
        before = {state(path) for path in paths}
        recover(tmp_path, Disk(math.inf), monkeypatch)
        seen.append((before, {state(path) for path in paths}))
        assert sorted(os.listdir(tmp_path)) == [path.name for path in paths]
        budget += step
    return seen


def test_a_kill_at_any_byte_leaves_the_old_or_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = every_kill(tmp_path, 1, journal.patch_in_place_many, monkeypatch)
    assert {str(*before) for before, _ in seen} == {"old", "", "new"}
    after = [str(*states) for _, states in seen]
    assert set(after) == {"old", "new"} and after == sorted(after, reverse=True)
    assert seen[-1] == ({"new"}, {"new"})


def test_without_the_journal_the_same_kills_leave_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = every_kill(tmp_path, 1, naive, monkeypatch)
    assert ({"mixed"}, {"mixed"}) in seen


def test_files_of_one_model_are_all_old_or_all_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = every_kill(tmp_path, 3, journal.patch_in_place_many, monkeypatch, step=7)
    assert all("mixed" not in before for before, _ in seen)
    assert {str(*after) for _, after in seen} == {"old", "new"}


def test_files_edited_one_by_one_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(changed: Mapping[Path, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
        for file, tensors in changed.items():
            journal.patch_in_place(file, tensors)

    assert any(len(after) > 1 for _, after in every_kill(tmp_path, 2, one_by_one, monkeypatch, step=50))


def test_recovery_may_be_killed_too(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, killed = 0, True
    while killed:
        try:
            recover(blank, Disk(budget), monkeypatch)
            killed = False
        except Killed:
            assert state(blank) in ("", "new")
        budget += 1
    assert budget > 50 and state(blank) == "new" and journal.pending(blank) == []


@pytest.mark.parametrize("keeps_order", [True, False])
def test_a_power_cut_may_lose_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_order: bool
) -> None:
    draw, seen = random.Random(0), set()
    for budget in range(0, 450, 3):
        (file,) = folder(tmp_path)
        disk = Disk(budget, keeps_order)
        interrupted([file], disk, journal.patch_in_place_many, monkeypatch)
        disk.cut(draw)
        seen.add(state(file))
        try:
            recover(tmp_path, Disk(math.inf), monkeypatch)
        except ErasecError:
            assert not keeps_order
        seen.add(state(file))
        for left in journal.pending(tmp_path):
            left.unlink()
    assert ("mixed" in seen) is not keeps_order
    assert {"old", "new", ""} <= seen


def test_sigkill(tmp_path: Path) -> None:
    size = 1_500_000
    base = {key: torch.zeros(size) for key in "abc"} | {"kept": torch.ones(8_000_000)}
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, base)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "erasec.checkpoint.journal"])
    draw, found, unfinished = random.Random(0), 0.0, 0
    for number in range(1, 11):
        changed = {key: partial(torch.full, (size,), float(number)) for key in "abc"}
        process = processes.Process(target=journal.patch_in_place, args=(file, changed))
        process.start()
        while not journal.pending(file) and process.is_alive():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.08))
        process.kill()
        process.join()
        unfinished += len(journal.pending(file))
        journal.recover(file)
        loaded = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
        values = {float(value) for key in "abc" for value in (loaded[key].min(), loaded[key].max())}
        assert values in ({found}, {float(number)}) and torch.equal(loaded["kept"], base["kept"])
        (found,) = values
    assert unfinished > 0


def test_nothing_moves_but_the_named_tensors(tmp_path: Path) -> None:
    (file,) = folder(tmp_path)
    checkpoint.patch(file, tmp_path / "patched", NEW)
    number = file.stat().st_ino
    journal.patch_in_place(file, NEW)
    assert file.read_bytes() == (tmp_path / "patched").read_bytes()
    assert file.stat().st_ino == number and journal.pending(tmp_path) == []
    journal.patch_in_place(file, {})
    assert file.read_bytes() == (tmp_path / "patched").read_bytes()


@pytest.mark.parametrize("kind", ["link", "hard link", "read-only"])
def test_what_others_may_use_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = folder(tmp_path)
    before, name = file.read_bytes(), tmp_path / "other.safetensors"
    if kind == "link":
        name.symlink_to(file)
    elif kind == "hard link":
        os.link(file, name)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ErasecError, match="cannot be edited in place") as caught:
        journal.patch_in_place(name if kind == "link" else file, NEW)
    assert {"link": "a link to", "hard link": "base of another model", "read-only": "written"}[kind] in caught.value.why
    assert file.read_bytes() == before and journal.pending(tmp_path) == []


@pytest.mark.parametrize("wrong", [{"a": lambda: torch.zeros(5)}, {"a": lambda: torch.zeros(6).half()}, {"z": old}])
def test_a_tensor_that_does_not_fit_changes_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (file,) = folder(tmp_path)
    before = file.read_bytes()
    with pytest.raises(ErasecError, match=r"the new a is|has no tensor 'z'"):
        journal.patch_in_place(file, {"b": NEW["b"], **wrong})
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


@pytest.fixture
def blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose edit was interrupted when it was mixed."""
    for budget in range(0, 1000, 5):
        (file,) = folder(tmp_path)
        interrupted([file], Disk(budget), journal.patch_in_place_many, monkeypatch)
        if file.read_bytes()[:8] == checkpoint.BLANK:
            return file
        recover(file, Disk(math.inf), monkeypatch)
    raise AssertionError("no kill left a mixed file")


def test_an_interrupted_file_says_what_to_do_and_recovers(blank: Path) -> None:
    with pytest.raises(ErasecError, match="was interrupted") as caught:
        checkpoint.read_header(blank)
    assert f"erasec recover {blank.parent}" in caught.value.fix
    with pytest.raises(ErasecError, match="running or was interrupted"):
        journal.patch_in_place(blank, NEW)
    assert journal.recover(blank) == [blank] and state(blank) == "new"
    assert journal.recover(blank) == []


def test_a_journal_does_not_touch_a_file_that_was_replaced(blank: Path) -> None:
    other = checkpoint.BLANK[:4] + b"another file"
    blank.write_bytes(other)
    with pytest.raises(ErasecError, match="is not the file that was edited"):
        journal.recover(blank)
    assert blank.read_bytes() == other
    checkpoint.save(blank, {**old(), "kept": torch.zeros(3)})  # another model in the same layout
    replaced = blank.read_bytes()
    assert journal.recover(blank) == [] and blank.read_bytes() == replaced


def test_a_lost_journal_is_said(blank: Path) -> None:
    for left in journal.pending(blank):
        left.unlink()
    with pytest.raises(ErasecError, match="cannot be recovered") as caught:
        journal.recover(blank.parent)
    assert "journal is gone" in caught.value.why


def test_a_journal_reaches_no_file_outside_its_folder(blank: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (left,) = journal.pending(blank)
    data = left.read_bytes().replace(b'"model-0.safetensors"', b'"../model-0.safetensors"')
    at = len(journal.MAGIC)
    data = data[:at] + (int.from_bytes(data[at : at + 8], "little") + 3).to_bytes(8, "little") + data[at + 8 : -32]
    (inside / left.name).write_bytes(data + journal.hashlib.sha256(data).digest())
    before = blank.read_bytes()
    with pytest.raises(ErasecError, match="is not the file that was edited"):
        journal.recover(inside)
    assert blank.read_bytes() == before


def failing(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Make journal.py's ``call``-th fsync raise ``error``. The first ends the journal, the third blanks the file."""
    calls = iter(range(1, 100))

    def fsync(handle: int) -> None:
        if next(calls) == call:
            raise error

    disk = Disk(math.inf)
    monkeypatch.setattr(disk, "fsync", fsync, raising=False)
    monkeypatch.setattr(journal, "os", disk)


ERRORS = (KeyboardInterrupt(), OSError(5, "Input/output error"))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_stops_the_journal_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (file,) = folder(tmp_path)
    with monkeypatch.context() as patched:
        failing(patched, 1, error)
        with pytest.raises((KeyboardInterrupt, ErasecError)) as caught:
            journal.patch_in_place(file, NEW)
    stopped = isinstance(error, KeyboardInterrupt)
    assert caught.value is error if stopped else "cannot be written: Input" in caught.value.why
    assert file.read_bytes() == file_bytes() and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_stops_the_edit_after_it_leaves_it_to_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (file,) = folder(tmp_path)
    for change in (partial(journal.patch_in_place, file, NEW), partial(journal.recover, tmp_path)):
        with monkeypatch.context() as patched:
            failing(patched, 3 if not journal.pending(file) else 1, error)
            with pytest.raises((ErasecError, KeyboardInterrupt, OSError)) as caught:
                change()
        assert isinstance(caught.value, ErasecError) and "was interrupted" in caught.value.what
        assert f"erasec recover {tmp_path}" in caught.value.fix and caught.value.__cause__ is error
        assert ("Input/output error" in caught.value.why) is isinstance(error, OSError)
        assert state(file) == "" and len(journal.pending(file)) == 1
    assert journal.recover(tmp_path) == [file] and state(file) == "new" and os.listdir(tmp_path) == [file.name]


def test_a_path_that_is_not_there_is_no_all_clear(tmp_path: Path, blank: Path) -> None:
    for name in ("typo", "model-0.safetensor"):
        with pytest.raises(ErasecError, match="there is no folder or file"):
            journal.recover(tmp_path / name)
    assert len(journal.pending(blank)) == 1
    journal.recover(blank)
    assert journal.recover(tmp_path) == []
    blank.unlink()
    (tmp_path / f".{blank.name}{journal.ENDING}").touch()
    assert journal.recover(blank) == [] and os.listdir(tmp_path) == []  # a journal is left of it, if nothing else


class Meanwhile:
    """The fcntl module, as journal.py sees it, before whose first lock another process does something."""

    LOCK_EX, LOCK_NB = journal.fcntl.LOCK_EX, journal.fcntl.LOCK_NB

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happens: list[Callable[[], object]] = [happens]

    def flock(self, handle: int, how: int) -> None:
        if self.happens:
            self.happens.pop()()
        fcntl.flock(handle, how)


def test_an_edit_whose_journal_was_removed_before_it_was_held_writes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = folder(tmp_path)
    assert journal.recover(tmp_path) == []
    monkeypatch.setattr(journal, "fcntl", Meanwhile(lambda: journal.recover(tmp_path)))
    left: list[bool] = []

    def tensor() -> torch.Tensor:
        left.append(len(journal.pending(file)) == 1)
        return NEW["a"]()

    journal.patch_in_place(file, {**NEW, "a": tensor})
    assert left == [True] and state(file) == "new" and os.listdir(tmp_path) == [file.name]


def test_recovery_of_an_edit_that_ends_meanwhile_does_nothing(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(journal, "fcntl", Meanwhile(lambda: journal.recover(blank)))
        assert journal.recover(blank) == [] and state(blank) == "new"
    (left,) = [blank.with_name(f".{blank.name}{journal.ENDING}")]
    monkeypatch.setattr(journal, "pending", lambda path: [left])
    assert journal.recover(blank) == []  # gone before it was opened


def test_recovery_holds_the_journal_of_that_name(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another edit's journal, put in the place of the one that was opened, is another edit's to finish."""
    (left,) = journal.pending(blank)
    other = blank.with_name("copy")
    other.write_bytes(left.read_bytes())
    with other.open("rb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        monkeypatch.setattr(journal, "fcntl", Meanwhile(lambda: os.replace(other, left)))
        with pytest.raises(ErasecError, match="still running"):
            journal.recover(blank)
    assert journal.recover(blank) == [blank] and os.listdir(blank.parent) == [blank.name]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without() -> None:
        raise OSError(37, "No locks available")

    (file,) = folder(tmp_path)
    monkeypatch.setattr(journal, "fcntl", Meanwhile(without))
    with pytest.raises(ErasecError, match="cannot be edited in place") as caught:
        journal.patch_in_place(file, NEW)
    assert "No locks available" in caught.value.why and os.listdir(tmp_path) == [file.name]


def test_another_users_journal_is_an_error_in_words(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Disk):
        def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
            raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(ErasecError, match="may not be opened") as caught:
        recover(blank, Closed(math.inf), monkeypatch)
    assert "another user" in caught.value.why and len(journal.pending(blank)) == 1
    assert journal.recover(blank) == [blank]


def test_an_edit_that_runs_is_left_alone(blank: Path) -> None:
    (left,) = journal.pending(blank)
    handle = os.open(left, os.O_RDWR)
    journal.fcntl.flock(handle, journal.fcntl.LOCK_EX)
    with pytest.raises(ErasecError, match="still running"):
        journal.recover(blank)
    os.close(handle)
    assert journal.recover(blank) == [blank]
