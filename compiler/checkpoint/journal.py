"""In-place edits of a checkpoint's files that survive a kill at any byte: all files are the old or the new ones.

The new bytes are first written to a journal (a redo log). The files are changed only after the journal is safely on
disk. While a file is partly old and partly new, the length of its header is overwritten, so that no loader accepts it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import StringConstraints

from erasec.checkpoint import manifest
from erasec.checkpoint.safetensors import BLANK, CHUNK, checked_data, read_header
from erasec.checkpoint.sealed import new_seal
from erasec.documents import Source, parse_json
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"erasec journal 1\n"
ENDING = ".erasec.journal"
DIGEST = 32


# The fields of a ``PatchedFile`` in the journal: a path relative to it, and the first bytes as hexadecimal digits.
_Hex = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})*$")]
_Row = tuple[str, int, int, _Hex, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class PatchedFile:
    """A file that a journal changes, as it was before: size, mtime in ns and first 8 bytes.

    ``ranges`` are the (start, length) of the replaced bytes, in the order of the journal's bytes.
    """

    file: Path
    size: int
    mtime: int
    first: bytes
    ranges: tuple[tuple[int, int], ...]


def patch_in_place(changed: Mapping[Path, Mapping[str, Callable[[], Tensor]]]) -> None:
    """Replace tensors inside safetensors files, in all files or in none.

    ``changed`` is {file: {tensor name: function}}. The functions are called one at a time and return the new tensor in
    the dtype and shape of the old one. During the edit, the common parent folder of the files contains a journal as
    large as the new tensors.

    Raises ErasecError before any change for: a symbolic link, a file with a second hard link or without write
    permission, an unfinished earlier edit, a journal that cannot be written, a tensor that does not fit. Raises
    ErasecError after a signal or a disk error that interrupts the changes; ``recover`` then completes them.
    """
    for file in changed:
        _check_file(file)
    manifest.check_readable(changed)
    makers = {file.resolve(): tensors for file, tensors in sorted(changed.items()) if tensors}
    if not makers:
        return
    folder = Path(os.path.commonpath([file.parent for file in makers]))
    journal = folder / f".{folder.name if len(makers) > 1 else next(iter(makers)).name}{ENDING}"
    try:
        handle = _create(journal)
    except FileExistsError as error:
        raise _unfinished_error(folder) from error
    except OSError as error:
        raise _in_place_error("no journal can be written", error) from error
    complete = False
    try:
        patched_files = _record(handle, folder, makers)
        _sync(folder)
        complete = True
        _redo(handle, patched_files)
        manifest.renew(makers)
        _remove(journal)
    except BaseException as error:
        if complete and isinstance(error, (KeyboardInterrupt, OSError)):
            raise _interrupted_error(folder, error) from error
        if not complete:
            os.unlink(journal)
        if isinstance(error, OSError):
            raise _in_place_error("the journal cannot be written", error) from error
        raise
    finally:
        os.close(handle)


def pending(path: Path) -> list[Path]:
    """The journals of unfinished in-place edits of a file, or of files in a folder. They may be in a parent folder."""
    path = path.resolve()
    journals = sorted(path.rglob(f".*{ENDING}")) if path.is_dir() else []
    for parent in path.parents:
        for journal in sorted(parent.glob(f".*{ENDING}")):
            own = journal.name == f".{path.name}{ENDING}" and parent == path.parent
            if own or any(file.is_relative_to(path) for file in _listed_files(journal)):
                journals.append(journal)
    return journals


def recover(path: Path) -> list[Path]:
    """Finish the interrupted in-place edits of a file, or of all files in a folder. Returns the files it finished.

    An incomplete journal is deleted, because its files have not been changed. Raises ErasecError if there is no such
    path, the edit is still running, a file was replaced since, a journal belongs to another user, or the journal of an
    interrupted file is missing. If the recovery is interrupted, it raises ErasecError and can be repeated.
    """
    finished: list[Path] = []
    journals = pending(path)
    if not journals and not path.exists():
        raise ErasecError(
            f"there is no folder or file {path}",
            why="no journal of an unfinished edit lists it either",
            fix="give the folder or the file that --in-place was changing",
        )
    for journal in journals:
        if (handle := _reopen(journal)) is None:  # the edit has ended in the meantime
            continue
        try:
            patched_files = _read(handle, journal)
            if patched_files and _needs_redo(patched_files, journal):
                _redo(handle, patched_files)
                finished += [patched.file for patched in patched_files]
            manifest.renew(patched.file for patched in patched_files or [])
            _remove(journal)
        except (KeyboardInterrupt, OSError) as error:
            raise _interrupted_error(path.resolve(), error) from error
        finally:
            os.close(handle)
    blank = path.rglob("*.safetensors") if path.is_dir() else [path]
    if unrecoverable := [file for file in blank if file.is_file() and _head(file) == BLANK]:
        raise ErasecError(
            f"{unrecoverable[0].name} cannot be recovered",
            where=str(unrecoverable[0]),
            why="an in-place edit of it was interrupted, and its journal is gone",
            fix="fetch the file again",
        )
    return finished


def _check_file(file: Path) -> None:
    """Raise ErasecError if a file cannot be edited in place, or if that could damage another model."""
    if not file.is_file():
        raise ErasecError(f"there is no file {file}")
    if file.is_symlink():
        raise _in_place_error(f"{file.name} is a link to {file.resolve()}, which other models may use")
    if (names := file.stat().st_nlink) > 1:
        raise _in_place_error(f"{file.name} has {names} names (hard links): it may be the base of another model")
    if not os.access(file, os.W_OK):
        raise _in_place_error(f"{file.name} cannot be written by this user")
    if pending(file):
        raise _unfinished_error(file)


def _in_place_error(why: str, error: OSError | None = None) -> ErasecError:
    why = f"{why}: {error.strerror}" if error else why
    return ErasecError("the model cannot be edited in place", why=why, fix="write a new one instead: --out DIR")


def _unfinished_error(path: Path) -> ErasecError:
    return ErasecError(
        f"an in-place edit of {path.name} is running or was interrupted",
        where=str(path),
        why="its journal is still there",
        fix=f"erasec recover {path}   finishes it",
    )


def _interrupted_error(path: Path, error: KeyboardInterrupt | OSError) -> ErasecError:
    return ErasecError(
        f"the in-place edit of {path.name} was interrupted",
        where=str(path),
        why=(error.strerror or str(error) if isinstance(error, OSError) else "it received an interrupt signal")
        + "; its tensors may be partly old and partly new",
        fix=f"erasec recover {path}   finishes it",
    )


def _create(journal: Path) -> int:
    """Create a journal and lock it. Returns the file descriptor. Raises FileExistsError if there is a journal."""
    while True:
        handle = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # A recovery may open the empty journal before it is locked here, and delete it. Then create it again.
        try:
            if _lock(handle, journal, wait=True):
                return handle
        except OSError:  # the file system has no locks, so no recovery can have deleted the journal
            os.unlink(journal)
            raise


def _reopen(journal: Path) -> int | None:
    """Open and lock an existing journal. Returns the file descriptor, or None if the journal is gone.

    Raises ErasecError if it belongs to another user, or if its edit is still running.
    """
    while True:
        try:
            handle = os.open(journal, os.O_RDWR)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise ErasecError(
                f"the journal {journal.name} may not be opened",
                why="it belongs to an in-place edit of another user",
                fix="let that user run erasec recover",
                where=str(journal),
            ) from error
        try:
            if _lock(handle, journal, wait=False):
                return handle
        except BlockingIOError as error:
            raise ErasecError(
                "an in-place edit is still running",
                where=str(journal),
                why="its process holds the lock of the journal",
                fix="wait until it has ended",
            ) from error


def _lock(handle: int, journal: Path, wait: bool) -> bool:
    """Lock a journal for this process. Returns False, and closes it, if its path has been deleted or replaced.

    If another process holds the lock, it waits for it with ``wait``, and else raises BlockingIOError.
    """
    locked = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        with suppress(FileNotFoundError):
            locked = os.path.samestat(os.fstat(handle), os.stat(journal))
    finally:
        if not locked:
            os.close(handle)
    return locked


def _record(handle: int, folder: Path, makers: Mapping[Path, Mapping[str, Callable[[], Tensor]]]) -> list[PatchedFile]:
    """Write the journal: MAGIC, length of the list of files, that list as JSON, the new bytes, sha256 of all before."""
    patched_files: list[PatchedFile] = []
    contents: list[Callable[[], bytes | memoryview]] = []
    for file, tensors in makers.items():
        entries, _ = read_header(file)
        if missing := set(tensors) - set(entries):
            raise ErasecError(f"{file.name} has no tensor {min(missing)!r}", where=str(file))
        keys = sorted(tensors, key=lambda key: entries[key].start)
        ranges = [(entries[key].start, entries[key].stop - entries[key].start) for key in keys]
        contents += [partial(checked_data, key, entries[key].dtype, entries[key].shape, tensors[key]) for key in keys]
        if seal := new_seal(file, tensors):
            start, new = seal
            ranges.append((start, len(new)))
            contents.append(partial(bytes, new))
        status = file.stat()
        patched_files.append(PatchedFile(file, status.st_size, status.st_mtime_ns, _head(file), tuple(ranges)))
    listing = [
        [patched.file.relative_to(folder).as_posix(), patched.size, patched.mtime, patched.first.hex(), patched.ranges]
        for patched in patched_files
    ]
    text = json.dumps(listing).encode()
    digest, offset = hashlib.sha256(), 0
    head = MAGIC + len(text).to_bytes(8, "little") + text
    for data in chain((head,), (make() for make in contents)):
        digest.update(data)
        offset = _write(handle, data, offset)
    _write(handle, digest.digest(), offset)
    os.fsync(handle)
    return patched_files


def _read(handle: int, journal: Path) -> list[PatchedFile] | None:
    """The files that a journal changes, or None if its digest shows that it is incomplete."""
    end = os.fstat(handle).st_size - DIGEST
    digest = hashlib.sha256()
    for offset in range(0, end, CHUNK):
        digest.update(os.pread(handle, min(CHUNK, end - offset), offset))
    return _parse(handle, journal) if end > 0 and os.pread(handle, DIGEST, end) == digest.digest() else None


def _parse(handle: int, journal: Path) -> list[PatchedFile]:
    """The files that a journal lists. Raises ErasecError if it has another format."""
    head = os.pread(handle, len(MAGIC) + 8, 0)
    if not head.startswith(MAGIC):
        raise ErasecError(
            f"{journal.name} is no journal of this version",
            where=str(journal),
            why="its format is unknown",
            fix="run recover with the version of erasec that started the edit",
        )
    length = min(int.from_bytes(head[len(MAGIC) :], "little"), os.fstat(handle).st_size)
    source = Source(journal.name, str(journal), "fetch the files of the model again", "is damaged")
    text = os.pread(handle, length, len(head)).decode("utf-8", "replace")
    return [
        PatchedFile(journal.parent / name, size, mtime, bytes.fromhex(first), ranges)
        for name, size, mtime, first, ranges in parse_json(text, list[_Row], source)
    ]


def _listed_files(journal: Path) -> list[Path]:
    """The paths that a journal lists; none if its list is incomplete."""
    try:
        with journal.open("rb") as stream:
            return [patched.file for patched in _parse(stream.fileno(), journal)]
    except (OSError, ValueError, ErasecError):
        return []


def _needs_redo(patched_files: list[PatchedFile], journal: Path) -> bool:
    """Whether the journal's bytes must be written to the files. False if all files are valid and were modified since.

    Raises ErasecError if a file is not the one that was edited, for example because it was downloaded again.
    """
    for patched in patched_files:
        # A journal may come with a downloaded folder. It must not change files outside of that folder.
        inside = patched.file.is_file() and patched.file.resolve() == patched.file
        valid = all(8 <= start <= start + length <= patched.size for start, length in patched.ranges)
        if inside and valid and patched.file.stat().st_size == patched.size:
            head = _head(patched.file)
            if all(byte in (0xFF, first) for byte, first in zip(head, patched.first, strict=True)):
                continue
        raise ErasecError(
            f"{patched.file.name} is not the file that was edited",
            why="it was replaced after the edit was interrupted",
            fix=f"restore it, or delete {journal} to abandon the edit",
            where=str(patched.file),
        )
    blank = any(_head(patched.file) != patched.first for patched in patched_files)
    return blank or all(patched.file.stat().st_mtime_ns == patched.mtime for patched in patched_files)


def _redo(journal: int, patched_files: list[PatchedFile]) -> None:
    """Write the journal's bytes to the files.

    A file is never partly old and partly new while its first 8 bytes are valid, whatever the order in which the disk
    executes the writes between two calls of fsync.
    """
    offset = (
        os.fstat(journal).st_size - DIGEST - sum(length for patched in patched_files for _, length in patched.ranges)
    )
    with ExitStack() as stack:
        files = [os.open(patched.file, os.O_RDWR | os.O_NOFOLLOW) for patched in patched_files]
        for file in files:
            stack.callback(os.close, file)
        _write_all(files, [BLANK] * len(files))
        for file, patched in zip(files, patched_files, strict=True):
            for start, length in patched.ranges:
                for done in range(0, length, CHUNK):
                    _write(file, os.pread(journal, min(CHUNK, length - done), offset + done), start + done)
                offset += length
            os.fsync(file)
        _write_all(files, [patched.first for patched in patched_files])


def _write_all(files: list[int], heads: list[bytes]) -> None:
    """Write the first bytes of all files, then sync all of them."""
    for file, head in zip(files, heads, strict=True):
        _write(file, head, 0)
    for file in files:
        os.fsync(file)


def _head(file: Path) -> bytes:
    """The first 8 bytes of a file, which are the length of a safetensors header."""
    with file.open("rb") as stream:
        return stream.read(8)


def _write(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of ``data`` at ``offset``. Returns the offset after it."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
    return offset


def _remove(journal: Path) -> None:
    os.unlink(journal)
    _sync(journal.parent)


def _sync(folder: Path) -> None:
    """Sync a folder, so that created and deleted names in it are safely on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
