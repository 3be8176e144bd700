"""The store: what one build made and a later one can use again, such as graphs, engines, pictures and edits.

An entry lies in the folder of its kind, under a key that is a digest of everything it depends on. It is one file, or a
folder of files, and carries the sha256 of its content: an entry that a full disk cut off, or another program changed,
is never used. Entries appear whole or not at all. The ones that were used longest ago are removed where the store would
exceed its limit, but none that a running command may be using.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from erasec.checkpoint.disk import FOLDER, PRIVATE_FOLDER, DiskFull, bytes_in, exchange, parse_size, remove
from erasec.checkpoint.owned import SCRATCH, Unavailable, scratch_folder
from erasec.checkpoint.safetensors import file_digest
from erasec.errors import ErasecError
from erasec.progress import note

# What is stored. Edits can undo an erasure, so that only their owner may read them.
KINDS = {
    "edits": "what passes solved or trained",
    "priors": "Gram matrices of the bundled captions",
    "graphs": "graphs without weights",
    "engines": "engines that another edit is written into",
    "pictures": "pictures of unedited models",
    "audit": "measured probes of audits",
}
PRIVATE = ("edits",)
DIGEST = 32  # bytes of the sha256 at the start of an entry that is a file
DIGESTS = "digests.json"  # the sha256 of each file of an entry that is a folder
LOCK = "lock"  # every user holds it shared
PRUNING = "pruning.lock"  # held by the one process that may take LOCK for itself alone
LIMIT = "ERASEC_CACHE_LIMIT"
DEFAULT_LIMIT = "20GB"
STARTED = time.time()  # entries used since then may be in use by this process


def cache_folder() -> Path:
    """The folder of the store: $ERASEC_CACHE, or erasec in $XDG_CACHE_HOME, or ~/.cache/erasec.

    Raises OSError where none of them is set and there is no home directory.
    """
    explicit, shared = os.environ.get("ERASEC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(explicit).expanduser() if explicit else Path(shared or "~/.cache").expanduser() / "erasec"
    except RuntimeError as error:
        raise OSError(f"{error} (set ERASEC_CACHE)") from error


def limit() -> int:
    """The largest size of the store in bytes, from $ERASEC_CACHE_LIMIT. Raises ErasecError where that is no size."""
    return parse_size(os.environ.get(LIMIT, DEFAULT_LIMIT), f"{LIMIT}=")


def caches() -> list[Path]:
    """The folders of the store in which commands that were killed may have left scratch folders."""
    try:
        return [cache_folder() / kind for kind in KINDS]
    except OSError:
        return []


@contextmanager
def unusable_is_noted() -> Iterator[None]:
    """Turn an error of the disk in the block into a note on stderr: the store is a convenience.

    Other errors, such as a limit that is no size, are raised.
    """
    try:
        yield
    except (OSError, DiskFull, Unavailable) as error:
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename is not None else ""
        _note(f"{error.what if isinstance(error, ErasecError) else error.strerror or error}{where}")


@cache
def _note(why: str) -> None:
    """Print the note once for each cause."""
    note(f"the cache cannot be used ({why}): what it would hold is made again in every build")


def read_entry(kind: str, key: str) -> bytes | None:
    """The content of an entry that is a file; None where it is not there, or its bytes have changed."""
    with unusable_is_noted():
        path = _shared(cache_folder()) / kind / key
        stored = path.read_bytes() if path.is_file() else b""
        if stored and stored[:DIGEST] == hashlib.sha256(stored[DIGEST:]).digest():
            _use(path)
            return stored[DIGEST:]
    return None


def write_entry(kind: str, key: str, content: bytes) -> None:
    """Write an entry that is a file. A store that cannot be written is a note."""
    with unusable_is_noted():
        path = _place(kind, key)
        with scratch_folder(path.parent) as scratch:
            (scratch / "entry").write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(scratch / "entry", path)
        _grown(path)


def read_folder(kind: str, key: str) -> Path | None:
    """An entry that is a folder; None where it is not there, or its files have changed. All of it is read.

    Raises OSError where the store cannot be read.
    """
    path = _shared(cache_folder()) / kind / key
    if not is_whole(path):
        return None
    _use(path)
    return path


def write_folder(kind: str, key: str, fill: Callable[[Path], None], replace: bool = False) -> Path:
    """The entry ``key``, a folder that ``fill`` writes its files into.

    Where another process has stored the entry meanwhile, that one stays, or with ``replace`` goes. Raises OSError where
    the entry can be neither written nor read.
    """
    path = _place(kind, key)
    try:
        with scratch_folder(path.parent) as scratch:
            stage = scratch / "entry"
            stage.mkdir(PRIVATE_FOLDER if kind in PRIVATE else FOLDER)
            fill(stage)
            seal(stage)
            if replace or not is_whole(path):
                if not path.exists() or not exchange(stage, path):
                    remove(path)
                    os.replace(stage, path)
                _grown(path)
    except OSError:
        if replace or not is_whole(path):
            raise
    return path


def seal(folder: Path) -> None:
    """Write the sha256 of each file in ``folder`` into it."""
    digests = {file.name: file_digest(file) for file in sorted(folder.iterdir())}
    text = json.dumps(digests, indent=1)
    (folder / DIGESTS).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a folder has exactly the files, with the bytes, that were in it when it was sealed."""
    try:
        digest, _, text = (folder / DIGESTS).read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text[:-1].encode()).hexdigest() != digest or text[-1:] != "\n":
            return False
        digests = json.loads(text)
        names = {file.name for file in folder.iterdir()} - {DIGESTS}
        return names == digests.keys() and all(file_digest(folder / name) == digests[name] for name in names)
    except (OSError, UnicodeDecodeError):
        return False


def _place(kind: str, key: str) -> Path:
    """Where an entry is to be written; its folder is made. Raises ErasecError where the limit of the store is no size,
    as the store would then grow without one."""
    limit()
    folder = _shared(cache_folder()) / kind
    folder.mkdir(PRIVATE_FOLDER if kind in PRIVATE else FOLDER, parents=True, exist_ok=True)
    return folder / key


def _use(path: Path) -> None:
    with suppress(OSError):  # another user's store can be read only
        os.utime(path)


# -- what is in the store --


@dataclass(frozen=True)
class Entry:
    """An entry: its kind, its path, its size in bytes, and when it was last used, in seconds since 1970."""

    kind: str
    path: Path
    bytes: int
    used: float

    def is_whole(self) -> bool:
        """Whether the content is what was stored. Reads all of it."""
        if self.path.is_dir():
            return is_whole(self.path)
        try:
            stored = self.path.read_bytes()
        except OSError:
            return False
        return len(stored) > DIGEST and stored[:DIGEST] == hashlib.sha256(stored[DIGEST:]).digest()


def entries(kinds: Iterable[str] = tuple(KINDS)) -> list[Entry]:
    """All entries of these kinds, the one that was used last at the end. Raises OSError where they cannot be listed."""
    result = []
    for kind in kinds:
        folder = cache_folder() / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            if not path.name.startswith(SCRATCH):
                with suppress(FileNotFoundError):  # another process has removed it
                    result.append(Entry(kind, path, bytes_in(path), path.stat().st_mtime))
    return sorted(result, key=lambda entry: entry.used)


def prune(bound: int, older: float = 0.0, kinds: Iterable[str] = tuple(KINDS)) -> list[Entry]:
    """Remove entries of these kinds until they have at most ``bound`` bytes, those used longest ago first; also all
    that were used last more than ``older`` seconds ago, where that is above 0. Returns the removed entries.

    Raises ErasecError where another command uses the store, and OSError where an entry cannot be listed.
    """
    with _alone() as alone:
        if not alone:
            raise ErasecError(
                "the cache is in use",
                where=str(cache_folder()),
                why="another command of erasec holds its lock, and may be reading any entry",
                fix="wait until that command has ended",
            )
        return _prune(entries(kinds), bound, older)


def remove_damaged(damaged: Sequence[Entry]) -> list[Entry]:
    """Remove those of the entries whose content still is not what was stored, and return them.

    A build may have exchanged an entry since it was read. So nothing is removed while another command uses the store,
    and nothing from a store that this user may not write to.
    """
    if damaged:
        with suppress(OSError), _alone() as alone:
            return _remove(entry for entry in damaged if not entry.is_whole()) if alone else []
    return []


def _prune(candidates: Sequence[Entry], bound: int, older: float) -> list[Entry]:
    total, now, chosen = sum(entry.bytes for entry in candidates), time.time(), []
    for entry in candidates:
        if total > bound or (older and now - entry.used > older):
            total -= entry.bytes
            chosen.append(entry)
    return _remove(chosen)


def _remove(chosen: Iterable[Entry]) -> list[Entry]:
    """Remove entries, and return those that were removed: another user's may not be."""
    removed = []
    for entry in chosen:
        remove(entry.path)
        if not os.path.lexists(entry.path):
            removed.append(entry)
    return removed


# -- its limit, and who uses it --

_unchecked: dict[Path, float] = {}  # by store: the bytes that may still be written before its size is measured again
_handles: dict[Path, int] = {}  # by store: the open lock file, on which this process holds a shared lock


def _grown(path: Path) -> None:
    """Remove old entries where the store has outgrown its limit.

    Its size is measured after the first entry that this process writes, and again after each twentieth of the limit.
    """
    root = path.parent.parent
    left = _unchecked.get(root, 0.0) - bytes_in(path)
    if left < 0:
        bound = limit()
        every = entries()
        total = sum(entry.bytes for entry in every)
        if total > bound:
            with _alone() as alone:
                if alone:  # otherwise another command does it later
                    old = [entry for entry in every if entry.used < STARTED]
                    recent = total - sum(entry.bytes for entry in old)
                    total -= sum(entry.bytes for entry in _prune(old, max(0, bound - recent), 0.0))
        left = max(bound - total, bound // 20)
    _unchecked[root] = left


def _shared(root: Path) -> Path:
    """``root``, on which this process from now on holds a shared lock, so that no other one removes its entries.

    The kernel gives the lock back when the process ends. A store that cannot be written to is locked as well, because
    its owner may remove entries; one without a lock file has no entries.
    """
    if root not in _handles:
        with suppress(OSError):
            root.mkdir(FOLDER, parents=True, exist_ok=True)
        with suppress(OSError):
            handle = _open(root / LOCK)
            _handles[root] = handle
            fcntl.flock(handle, fcntl.LOCK_SH)
    return root


def _open(path: Path) -> int:
    """The opened lock file ``path``: to write where this user may, else to read, which is enough for a lock."""
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise error from None


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other process uses the store; for the block, none begins to.

    An attempt to make a shared lock an exclusive one gives the shared one up, also where it fails. PRUNING keeps every
    other process from removing entries until this one has its shared lock again. Raises OSError where this user may not
    write to the store.
    """
    root = _shared(cache_folder())
    handle = _handles.get(root)
    if handle is None:
        yield True  # there is no store
        return
    pruning = _open(root / PRUNING)
    try:
        try:
            fcntl.flock(pruning, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield _exclusive(handle)
        finally:
            fcntl.flock(handle, fcntl.LOCK_SH)
    finally:
        os.close(pruning)  # which unlocks it


def _exclusive(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(handle, fcntl.LOCK_SH)
        return False
    return True
