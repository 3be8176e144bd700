"""Outputs that appear whole or not at all: one process writes an output at a time, and a kill leaves the old or new.

While ``OUT`` is written, a hidden folder ``.OUT.erasec`` next to it holds the lock, the new output, and for a moment
the old one. Where the process was killed, the next command puts back or removes what is in it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint import owned
from erasec.checkpoint.disk import FOLDER, exchange, named_errors, remove, sync, sync_folder
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from filelock import FileLock

SUFFIX = ".erasec"
STAGE, OLD, TRASH, TRAINING = "stage", "old", "trash", "training"


@dataclass(frozen=True)
class Output:
    """An output that this process may write: ``path``, with links resolved, and the working folder next to it."""

    path: Path
    work: Path

    @property
    def stage(self) -> Path:
        """Where the new file or folder is written before it is published."""
        return self.work / STAGE

    @property
    def training(self) -> Path:
        """A folder that stays until the output is published, so that training can resume after an interrupt."""
        return self.work / TRAINING

    def new_folder(self) -> Path:
        """Make the stage a folder."""
        self.stage.mkdir(FOLDER)
        return self.stage

    def publish(self, path: Path | None = None) -> None:
        """Move the stage to ``path``, by default the output's own, and remove what was there before.

        At every moment, and after a power loss, the old or the new is at the path; where the file system cannot
        exchange two folders, the old may be in the working folder for a moment, from which ``settle`` takes it back.
        """
        target = self.path if path is None else path
        sync(self.stage)
        if not self.stage.is_dir() or not os.path.lexists(target):
            os.replace(self.stage, target)
        elif not exchange(self.stage, target):
            self._swap(target)
        sync_folder(target.parent)
        self._discard(STAGE)
        if target == self.path:
            remove(self.training)

    def _swap(self, target: Path) -> None:
        # Only a whole output is ever called OLD: what has another name is removed, and never restored.
        old = self.work / (OLD if target == self.path else TRASH)
        self._discard(TRASH)
        try:
            os.rename(target, old)
            os.rename(self.stage, target)
        except BaseException:
            if old.exists() and not os.path.lexists(target):
                os.rename(old, target)
            raise
        sync_folder(target.parent)
        self._discard(OLD)
        self._discard(TRASH)

    def _discard(self, name: str) -> None:
        """Remove a part of the working folder, under a name from which nothing is restored."""
        with suppress(OSError):
            if name != TRASH:
                remove(self.work / TRASH)
                os.rename(self.work / name, self.work / TRASH)
        remove(self.work / TRASH)

    def restore(self) -> None:
        """Finish what a killed process left: put back the old output where there is none, and remove its stage."""
        if os.path.lexists(self.work / OLD) and not os.path.lexists(self.path):
            os.rename(self.work / OLD, self.path)
            sync_folder(self.path.parent)
        for name in (OLD, STAGE, TRASH):
            if os.path.lexists(self.work / name):
                self._discard(name)

    def end(self) -> None:
        """Remove the working folder, or all of it but the state of training."""
        with suppress(OSError):
            self.restore()
        if os.path.lexists(self.work / OLD):  # it could not be put back
            return
        if self.training.is_dir():
            for part in self.training.glob(".*"):  # files that a killed process had not finished
                remove(part)
            with suppress(OSError):
                self.training.rmdir()
        if not self.training.exists():
            owned.remove_folder(self.work)


@contextmanager
def output(path: Path, fresh: bool = False, total: int = 0) -> Iterator[Output]:
    """The right to write ``path`` for the block. What the block does not publish is removed when it ends.

    Where ``path`` is a link, what it points to is written. With ``fresh``, nothing may be there but an empty folder.
    ``total`` are the bytes that will be written, 0 where it is not known; an error of a full disk states the rest.

    Raises ErasecError where another command writes this path, or one around or in it; for a link to nothing; and, with
    ``fresh``, where something is there already.
    """
    check_place(path)
    path = path.resolve()
    if fresh:
        check_fresh(path)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        own = Output(path, work_folder(path))
        lock = _acquire(own.work)
        try:
            for other in _related(path):
                owned.check_not_held(other)
            own.restore()
            _settle(_inside(path))
            if fresh:
                check_fresh(path)
            with named_errors(path, own.stage, total):
                yield own
        finally:
            try:
                own.end()
            except BaseException:  # an interrupt; the command line ignores further ones while it handles this one
                own.end()
                raise
            finally:
                lock.release()
    finally:
        for folder in made:  # where nothing was published, they are empty
            with suppress(OSError):
                folder.rmdir()


def _acquire(folder: Path) -> FileLock:
    try:
        with named_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            return owned.acquire(folder)
    except OSError as error:
        raise ErasecError(
            f"nothing can be written in {folder.parent}",
            why=error.strerror or str(error),
            fix="give another path with --out",
        ) from error


def work_folder(path: Path) -> Path:
    """The working folder of the output ``path``."""
    return path.parent / f".{path.name}{SUFFIX}"


def training_folder(path: Path) -> Path:
    """The folder in which the training of a build of ``path`` keeps its state."""
    return work_folder(path.resolve()) / TRAINING


def check_place(path: Path) -> None:
    """Raise ErasecError where ``path`` is a link to nothing, or a folder at which a disk is mounted."""
    if path.is_symlink() and not path.exists():
        raise ErasecError(
            f"{path} is a link to {os.readlink(path)}, which is not there",
            why="a disk may not be mounted, and the output would be written somewhere else",
            fix="remove the link or make what it points to, or give another path with --out",
        )
    if path.is_dir() and path.resolve().is_mount():
        raise ErasecError(
            f"a disk is mounted at {path}",
            why="an output folder is replaced as a whole, and a mounted one cannot be",
            fix=f"give a folder in it: --out {path / 'build'}",
        )


def check_fresh(path: Path) -> None:
    """Raise ErasecError where there is anything at ``path`` but an empty folder."""
    check_place(path)
    if path.is_dir() and any(path.iterdir()):
        raise ErasecError(f"the output folder {path} is not empty", fix="give a path that does not exist yet")
    if path.exists() and not path.is_dir():
        raise ErasecError(f"{path} exists", fix="give a path that does not exist yet")


def check_free(path: Path) -> None:
    """Raise ErasecError where another command writes ``path``, or an output around or in it."""
    path = path.resolve()
    for folder in (work_folder(path), *_related(path)):
        owned.check_not_held(folder)


def _related(path: Path) -> Iterator[Path]:
    """The working folders of outputs that ``path`` lies in, and of those that lie in ``path``."""
    yield from (work_folder(parent) for parent in path.parents if parent.name)
    yield from _inside(path)


def _inside(folder: Path) -> list[Path]:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    return [folder / name for name in names if name.startswith(".") and name.endswith(SUFFIX) and name != SUFFIX]


def settle(path: Path) -> None:
    """Restore and remove what killed commands left at ``path``, around it and in it.

    Nothing is done about outputs that another process writes, and about folders that are not ours.
    """
    try:
        path = path.resolve()
        folders = [work_folder(place) for place in (path, *path.parents) if place.name] + _inside(path)
    except (OSError, ValueError, RuntimeError):  # no path: a phrase that is too long, a loop of links
        return
    _settle(folders)


def _settle(folders: Iterable[Path]) -> None:
    for folder in folders:
        if (lock := owned.acquire_abandoned(folder)) is not None:
            own = Output(folder.parent / folder.name.removeprefix(".").removesuffix(SUFFIX), folder)
            with suppress(OSError):
                own.restore()
                own.end()
            lock.release()


def settle_all(paths: Iterable[Path], caches: Iterable[Path]) -> None:
    """``settle`` for each of the ``paths``; and remove the scratch folders of killed commands, also in ``caches``."""
    for path in paths:
        settle(path)
    for folder in (Path(tempfile.gettempdir()), *caches):
        owned.sweep(folder)


NAME_BYTES = 120


def file_name(words: Iterable[str]) -> str:
    """Join ``words`` to a file name of at most NAME_BYTES bytes, with letters, digits, "_", "." and "-" only.

    The name contains no path separator and does not start with a dot. It is empty if the words have no letter or digit.
    """
    name = "-".join(filter(None, (re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words)))
    return name.encode()[:NAME_BYTES].decode(errors="ignore").rstrip("-.")
