"""Tensors replaced inside a checkpoint's own files, so that a kill at any byte leaves all of the old or all of the new.

The new bytes go to a journal first, and the files are touched when it is safe on disk (a redo log). While a file is
part old and part new, the length of its header is overwritten, so that no loader takes it for a whole one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.safetensors import BLANK, CHUNK, Entry, made, read_header
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MAGIC = b"erasec journal 1\n"
ENDING = ".erasec.journal"
DIGEST = 32


@dataclass(frozen=True)
class Target:
    """A file of a journal, as it was before: size, mtime in ns, its first 8 bytes. ``ranges`` are the (start, length)
    of what is replaced, in the order of the journal's bytes."""

    file: Path
    size: int
    mtime: int
    first: bytes
    ranges: tuple[tuple[int, int], ...]


def patch_in_place(file: Path, changed: Mapping[str, Callable[[], Tensor]]) -> None:
    """``patch_in_place_many`` of one file."""
    patch_in_place_many({file: changed})


def patch_in_place_many(changed: Mapping[Path, Mapping[str, Callable[[], Tensor]]]) -> None:
    """Replace tensors inside safetensors files: when this returns, or after ``recover``, in all of them or in none.

    ``changed`` maps files and keys to functions, called one at a time, that give the new tensor in the old one's dtype
    and shape. Meanwhile one journal, as large as the new tensors, lies in the folder that holds all the files.
    Raises ErasecError, and nothing is changed, for a link, a file with a second name or without write permission, an
    unfinished earlier edit, no room for the journal, and a tensor that does not fit; and, with the files left for
    ``recover``, where a signal or the disk stops it after the journal is whole.
    """
    for file in changed:
        _refuse(file)
    makers = {file.resolve(): tensors for file, tensors in sorted(changed.items()) if tensors}
    if not makers:
        return
    home = Path(os.path.commonpath([file.parent for file in makers]))
    journal = home / f".{home.name if len(makers) > 1 else next(iter(makers)).name}{ENDING}"
    try:
        handle = _create(journal)
    except FileExistsError as error:
        raise _unfinished(home) from error
    except OSError as error:
        raise _not_in_place("no journal can be written", error) from error
    whole = False
    try:
        targets = _record(handle, home, makers)
        _sync(home)
        whole = True
        _redo(handle, targets)
        _remove(journal)
    except BaseException as error:
        if whole and isinstance(error, (KeyboardInterrupt, OSError)):
            raise _stopped(home, error) from error
        if not whole:
            os.unlink(journal)
        if isinstance(error, OSError):
            raise _not_in_place("the journal cannot be written", error) from error
        raise
    finally:
        os.close(handle)


def pending(path: Path) -> list[Path]:
    """Journals of unfinished in-place edits of a file, or of anything in a folder, wherever they lie."""
    path = path.resolve()
    found = sorted(path.rglob(f".*{ENDING}")) if path.is_dir() else []
    for around in path.parents:
        for journal in sorted(around.glob(f".*{ENDING}")):
            own = journal.name == f".{path.name}{ENDING}" and around == path.parent
            if own or any(file.is_relative_to(path) for file in _named(journal)):
                found.append(journal)
    return found


def recover(path: Path) -> list[Path]:
    """Finish interrupted in-place edits of a file, or of all in a folder; returns the files that were finished now.

    A journal that is not whole is removed: its files had not been touched. Raises ErasecError where there is nothing of
    that name, the edit is still running, a file is not the one that was edited, a journal is another user's, or an
    interrupted file's journal is gone; and where it is stopped itself, which leaves the rest for the next time.
    """
    finished: list[Path] = []
    journals = pending(path)
    if not journals and not path.exists():
        raise ErasecError(
            f"there is no folder or file {path}", why="nor does a journal name it",
            fix="give the folder or the file that --in-place was changing",
        )  # fmt: skip
    for journal in journals:
        if (handle := _reopen(journal)) is None:  # its edit came to its end meanwhile
            continue
        try:
            targets = _read(handle, journal)
            if targets and _unmoved(targets, journal):
                _redo(handle, targets)
                finished += [target.file for target in targets]
            _remove(journal)
        except (KeyboardInterrupt, OSError) as error:
            raise _stopped(path.resolve(), error) from error
        finally:
            os.close(handle)
    blank = path.rglob("*.safetensors") if path.is_dir() else [path]
    if lost := [file for file in blank if file.is_file() and _head(file) == BLANK]:
        raise ErasecError(
            f"{lost[0].name} cannot be recovered", where=str(lost[0]),
            why="an in-place edit of it was interrupted, and its journal is gone", fix="fetch the file again",
        )  # fmt: skip
    return finished


def _refuse(file: Path) -> None:
    if not file.is_file():
        raise ErasecError(f"there is no file {file}")
    if file.is_symlink():
        raise _not_in_place(f"{file.name} is a link to {file.resolve()}, which others may use too")
    if (names := file.stat().st_nlink) > 1:
        raise _not_in_place(f"{file.name} has {names} names (hard links): it may be the base of another model")
    if not os.access(file, os.W_OK):
        raise _not_in_place(f"{file.name} may not be written")
    if pending(file):
        raise _unfinished(file)


def _not_in_place(why: str, error: OSError | None = None) -> ErasecError:
    why = f"{why}: {error.strerror}" if error else why
    return ErasecError("the model cannot be edited in place", why=why, fix="write a new one instead: --out DIR")


def _unfinished(path: Path) -> ErasecError:
    return ErasecError(
        f"an in-place edit of {path.name} is running or was interrupted", where=str(path),
        why="its journal is still there", fix=f"erasec recover {path}   finishes it",
    )  # fmt: skip


def _stopped(path: Path, error: KeyboardInterrupt | OSError) -> ErasecError:
    return ErasecError(
        f"the in-place edit of {path.name} was interrupted", where=str(path),
        why=(error.strerror or str(error) if isinstance(error, OSError) else "it was told to stop")
        + "; its tensors may be partly old and partly new", fix=f"erasec recover {path}   finishes it",
    )  # fmt: skip


def _create(journal: Path) -> int:
    """A new journal, held by this process. Raises FileExistsError where there is one."""
    while True:
        handle = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # A recovery that finds it empty, before it is held here, removes it: wait for that, and start over.
        try:
            if _held(handle, journal, wait=True):
                return handle
        except OSError:  # a file system without locks, on which no recovery can have removed it
            os.unlink(journal)
            raise


def _reopen(journal: Path) -> int | None:
    """A journal that was left, held by this process, or None where it is gone. Raises ErasecError for another's."""
    while True:
        try:
            handle = os.open(journal, os.O_RDWR)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise ErasecError(
                f"the journal {journal.name} may not be opened", why="another user's in-place edit left it",
                fix="let that user run erasec recover", where=str(journal),
            ) from error  # fmt: skip
        try:
            if _held(handle, journal, wait=False):
                return handle
        except BlockingIOError as error:
            raise ErasecError(
                "an in-place edit is still running", where=str(journal), fix="wait for its end"
            ) from error


def _held(handle: int, journal: Path, wait: bool) -> bool:
    """Lock a journal for this process alone. It is closed, and the answer is False, where the file of that name is
    gone or another one by then. Raises BlockingIOError where another process has it, unless ``wait``."""
    held = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        with suppress(FileNotFoundError):
            held = os.path.samestat(os.fstat(handle), os.stat(journal))
    finally:
        if not held:
            os.close(handle)
    return held


def _record(handle: int, home: Path, makers: Mapping[Path, Mapping[str, Callable[[], Tensor]]]) -> list[Target]:
    """Write the journal: MAGIC, length of the list of targets, that list as JSON, the new bytes, sha256 of it all."""
    targets: list[Target] = []
    places: list[tuple[str, Entry, Callable[[], Tensor]]] = []
    for file, tensors in makers.items():
        entries, _ = read_header(file)
        if missing := set(tensors) - set(entries):
            raise ErasecError(f"{file.name} has no tensor {min(missing)!r}", where=str(file))
        keys = sorted(tensors, key=lambda key: entries[key].start)
        ranges = tuple((entries[key].start, entries[key].stop - entries[key].start) for key in keys)
        status = file.stat()
        targets.append(Target(file, status.st_size, status.st_mtime_ns, _head(file), ranges))
        places += [(key, entries[key], tensors[key]) for key in keys]
    listed = [[t.file.relative_to(home).as_posix(), t.size, t.mtime, t.first.hex(), t.ranges] for t in targets]
    text = json.dumps(listed).encode()
    digest, at = hashlib.sha256(), 0
    head = MAGIC + len(text).to_bytes(8, "little") + text
    new: Iterator[bytes | memoryview] = (made(key, entry.dtype, entry.shape, make) for key, entry, make in places)
    for data in chain((head,), new):
        digest.update(data)
        at = _write(handle, data, at)
    _write(handle, digest.digest(), at)
    os.fsync(handle)
    return targets


def _read(handle: int, journal: Path) -> list[Target] | None:
    """What a journal replaces, or None where it is not whole, by its digest."""
    end = os.fstat(handle).st_size - DIGEST
    digest = hashlib.sha256()
    for at in range(0, end, CHUNK):
        digest.update(os.pread(handle, min(CHUNK, end - at), at))
    return _targets(handle, journal) if end > 0 and os.pread(handle, DIGEST, end) == digest.digest() else None


def _targets(handle: int, journal: Path) -> list[Target]:
    head = os.pread(handle, len(MAGIC) + 8, 0)
    if not head.startswith(MAGIC):
        raise ErasecError(f"{journal.name} is no journal of this version", where=str(journal))
    length = min(int.from_bytes(head[len(MAGIC) :], "little"), os.fstat(handle).st_size)
    listed = json.loads(os.pread(handle, length, len(head)))
    return [
        Target(
            journal.parent / name, size, mtime, bytes.fromhex(first), tuple((start, length) for start, length in ranges)
        )
        for name, size, mtime, first, ranges in listed
    ]


def _named(journal: Path) -> list[Path]:
    """The files that a journal names; none where it is not whole that far."""
    try:
        with journal.open("rb") as stream:
            return [target.file for target in _targets(stream.fileno(), journal)]
    except (OSError, ValueError, ErasecError):
        return []


def _unmoved(targets: list[Target], journal: Path) -> bool:
    """Whether the journal's bytes must be written: not where every file is whole again and was written since.

    Raises ErasecError where a file is not the one that was edited, such as one that was fetched again.
    """
    for target in targets:
        # A journal comes with the folder it lies in: it must not reach out of it.
        known = target.file.is_file() and target.file.resolve() == target.file
        within = all(8 <= start <= start + length <= target.size for start, length in target.ranges)
        if known and within and target.file.stat().st_size == target.size:
            head = _head(target.file)
            if all(byte in (0xFF, first) for byte, first in zip(head, target.first, strict=True)):
                continue
        raise ErasecError(
            f"{target.file.name} is not the file that was edited", why="it was replaced after the edit was interrupted",
            fix=f"put it back, or remove {journal} to give the edit up", where=str(target.file),
        )  # fmt: skip
    blank = any(_head(target.file) != target.first for target in targets)
    return blank or all(target.file.stat().st_mtime_ns == target.mtime for target in targets)


def _redo(journal: int, targets: list[Target]) -> None:
    """Write the journal's bytes to their places. No file is mixed while its first 8 bytes are whole, in any order in
    which the disk may take what lies between two calls of fsync."""
    at = os.fstat(journal).st_size - DIGEST - sum(length for target in targets for _, length in target.ranges)
    with ExitStack() as stack:
        files = [os.open(target.file, os.O_RDWR | os.O_NOFOLLOW) for target in targets]
        for file in files:
            stack.callback(os.close, file)
        _write_all(files, [BLANK] * len(files))
        for file, target in zip(files, targets, strict=True):
            for start, length in target.ranges:
                for done in range(0, length, CHUNK):
                    _write(file, os.pread(journal, min(CHUNK, length - done), at + done), start + done)
                at += length
            os.fsync(file)
        _write_all(files, [target.first for target in targets])


def _write_all(files: list[int], heads: list[bytes]) -> None:
    for file, head in zip(files, heads, strict=True):
        _write(file, head, 0)
    for file in files:
        os.fsync(file)


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(8)


def _write(file: int, data: bytes | memoryview, at: int) -> int:
    """Write all of ``data`` at an offset; returns the offset behind it."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count
    return at


def _remove(journal: Path) -> None:
    os.unlink(journal)
    _sync(journal.parent)


def _sync(folder: Path) -> None:
    """Make a folder's list of names safe on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
