"""Recovery of interrupted in-place edits, errors that interrupt them, and edits that run at the same time."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from killed_edits import NEW, Disk, file_bytes, folder, old, recover, state

from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError


def test_an_interrupted_file_says_what_to_do_and_recovers(blank: Path) -> None:
    with pytest.raises(ErasecError, match="was interrupted") as caught:
        checkpoint.read_header(blank)
    assert f"erasec recover {blank.parent}" in caught.value.fix
    with pytest.raises(ErasecError, match="running or was interrupted"):
        journal.patch_in_place({blank: NEW})
    assert journal.recover(blank) == [blank] and state(blank) == "new"
    assert journal.recover(blank) == []


def test_a_journal_does_not_touch_a_file_that_was_replaced(blank: Path) -> None:
    other = checkpoint.BLANK[:4] + b"another file"
    blank.write_bytes(other)
    with pytest.raises(ErasecError, match="is not the file that was edited"):
        journal.recover(blank)
    assert blank.read_bytes() == other
    checkpoint.save_tensors(blank, {**old(), "kept": torch.zeros(3)})  # another model in the same layout
    replaced = blank.read_bytes()
    assert journal.recover(blank) == [] and blank.read_bytes() == replaced


def test_a_lost_journal_is_an_error(blank: Path) -> None:
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
def test_an_interrupted_journal_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (file,) = folder(tmp_path)
    with monkeypatch.context() as patched:
        failing(patched, 1, error)
        with pytest.raises((KeyboardInterrupt, ErasecError)) as caught:
            journal.patch_in_place({file: NEW})
    stopped = isinstance(error, KeyboardInterrupt)
    assert caught.value is error if stopped else "cannot be written: Input" in caught.value.why
    assert file.read_bytes() == file_bytes() and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_edit_interrupted_after_its_journal_is_left_to_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (file,) = folder(tmp_path)
    for change in (partial(journal.patch_in_place, {file: NEW}), partial(journal.recover, tmp_path)):
        with monkeypatch.context() as patched:
            failing(patched, 3 if not journal.pending(file) else 1, error)
            with pytest.raises((ErasecError, KeyboardInterrupt, OSError)) as caught:
                change()
        assert isinstance(caught.value, ErasecError) and "was interrupted" in caught.value.what
        assert f"erasec recover {tmp_path}" in caught.value.fix and caught.value.__cause__ is error
        assert ("Input/output error" in caught.value.why) is isinstance(error, OSError)
        assert state(file) == "" and len(journal.pending(file)) == 1
    assert journal.recover(tmp_path) == [file] and state(file) == "new" and os.listdir(tmp_path) == [file.name]


def test_a_missing_path_is_an_error(tmp_path: Path, blank: Path) -> None:
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


def test_an_edit_whose_journal_was_deleted_before_it_was_locked_writes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = folder(tmp_path)
    assert journal.recover(tmp_path) == []
    monkeypatch.setattr(journal, "fcntl", Meanwhile(lambda: journal.recover(tmp_path)))
    left: list[bool] = []

    def tensor() -> torch.Tensor:
        left.append(len(journal.pending(file)) == 1)
        return NEW["a"]()

    journal.patch_in_place({file: {**NEW, "a": tensor}})
    assert left == [True] and state(file) == "new" and os.listdir(tmp_path) == [file.name]


def test_recovery_of_an_edit_that_ends_meanwhile_does_nothing(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(journal, "fcntl", Meanwhile(lambda: journal.recover(blank)))
        assert journal.recover(blank) == [] and state(blank) == "new"
    (left,) = [blank.with_name(f".{blank.name}{journal.ENDING}")]
    monkeypatch.setattr(journal, "pending", lambda path: [left])
    assert journal.recover(blank) == []  # gone before it was opened


def test_recovery_leaves_a_journal_that_another_edit_put_there(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        journal.patch_in_place({file: NEW})
    assert "No locks available" in caught.value.why and os.listdir(tmp_path) == [file.name]


def test_another_users_journal_is_an_error(blank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
