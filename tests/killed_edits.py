"""In-place edits that are killed: a file system that dies after a number of bytes and calls, and small files for it."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint

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
        checkpoint.save_tensors(Path(file.name), old())
        return Path(file.name).read_bytes()


def state(file: Path) -> str:
    """ "old", "new" or "mixed" by what the library loads, "" where it does not."""
    try:
        with safe_open(file, "pt") as tensors:
            loaded = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError:
        return ""
    new = {**old(), **{key: make() for key, make in NEW.items()}}
    for name, content in (("old", old()), ("new", new)):
        if all(torch.equal(loaded[key], content[key]) for key in content):
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
