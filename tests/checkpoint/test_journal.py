"""Edits in place: after a kill at any byte, a power cut, or an error, a file is the old one or the new one."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_edits import NEW, Disk, Killed, Patch, folder, interrupted, old, recover, state

from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError


def naive(changed: Mapping[Path, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
    """What the journal is there to prevent."""
    for file, tensors in changed.items():
        entries, _ = checkpoint.read_header(file)
        handle = journal.os.open(file, os.O_RDWR)
        for key, make in tensors.items():
            journal.os.pwrite(handle, checkpoint.tensor_bytes(make()), entries[key].start)
        os.close(handle)


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
    seen = every_kill(tmp_path, 1, journal.patch_in_place, monkeypatch)
    assert {str(*before) for before, _ in seen} == {"old", "", "new"}
    after = [str(*states) for _, states in seen]
    assert set(after) == {"old", "new"} and after == sorted(after, reverse=True)
    assert seen[-1] == ({"new"}, {"new"})


def test_without_the_journal_the_same_kills_leave_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = every_kill(tmp_path, 1, naive, monkeypatch)
    assert ({"mixed"}, {"mixed"}) in seen


def test_files_of_one_model_are_all_old_or_all_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = every_kill(tmp_path, 3, journal.patch_in_place, monkeypatch, step=7)
    assert all("mixed" not in before for before, _ in seen)
    assert {str(*after) for _, after in seen} == {"old", "new"}


def test_files_edited_one_by_one_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(changed: Mapping[Path, Mapping[str, Callable[[], torch.Tensor]]]) -> None:
        for file, tensors in changed.items():
            journal.patch_in_place({file: tensors})

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
        interrupted([file], disk, journal.patch_in_place, monkeypatch)
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
    checkpoint.save_tensors(file, base)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "erasec.checkpoint.journal"])
    draw, before, unfinished = random.Random(0), 0.0, 0
    for number in range(1, 11):
        changed = {key: partial(torch.full, (size,), float(number)) for key in "abc"}
        process = processes.Process(target=journal.patch_in_place, args=({file: changed},))
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
        assert values in ({before}, {float(number)}) and torch.equal(loaded["kept"], base["kept"])
        (before,) = values
    assert unfinished > 0


def test_nothing_moves_but_the_named_tensors(tmp_path: Path) -> None:
    (file,) = folder(tmp_path)
    checkpoint.patch_file(file, tmp_path / "patched", NEW)
    number = file.stat().st_ino
    journal.patch_in_place({file: NEW})
    assert file.read_bytes() == (tmp_path / "patched").read_bytes()
    assert file.stat().st_ino == number and journal.pending(tmp_path) == []
    journal.patch_in_place({file: {}})
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
        journal.patch_in_place({name if kind == "link" else file: NEW})
    assert {"link": "a link to", "hard link": "base of another model", "read-only": "written"}[kind] in caught.value.why
    assert file.read_bytes() == before and journal.pending(tmp_path) == []


@pytest.mark.parametrize("wrong", [{"a": lambda: torch.zeros(5)}, {"a": lambda: torch.zeros(6).half()}, {"z": old}])
def test_a_tensor_that_does_not_fit_changes_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (file,) = folder(tmp_path)
    before = file.read_bytes()
    with pytest.raises(ErasecError, match=r"the new a is|has no tensor 'z'"):
        journal.patch_in_place({file: {"b": NEW["b"], **wrong}})
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]
