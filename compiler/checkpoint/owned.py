"""Folders for work in progress, each owned by the process that holds its lock.

The kernel gives a lock back when its process ends, however it ends. A folder whose lock nobody holds was left behind,
so the next command may remove it. A folder that is not ours is never touched.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.disk import PRIVATE_FILE, PRIVATE_FOLDER, named_errors, remove
from erasec.documents import read_json
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from filelock import FileLock

# ``filelock`` takes longer to import than a short command runs, so it is imported where a lock is needed.


class Unavailable(ErasecError):
    """A folder for work in progress that this process cannot have: another one holds it, or it is not erasec's."""


LOCK = "lock"
OWNER = "owner.json"
NEW_OWNER = "owner.json.new"
BARE = {LOCK, OWNER, NEW_OWNER}  # all that is in a folder in which no work has begun
WAIT_S = 1.0  # longer than a command needs to look at what another one left behind
SCRATCH = "erasec-"


def is_ours(folder: Path) -> bool:
    """Whether erasec made ``folder`` for work in progress: it says who owned it, or it holds nothing."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return False
        names = set(os.listdir(folder))
        return names <= BARE or (LOCK in names and OWNER in names and _is_record(folder / OWNER))
    except OSError:
        return False


def _is_record(file: Path) -> bool:
    return file.stat().st_size == 0 or bool(_owner(file.parent))  # after a power loss it may be empty


def _owner(folder: Path) -> dict[str, Any]:
    """What the process that owns, or owned, a folder says of itself; {} where it says nothing."""
    try:
        record = read_json(folder / OWNER, dict[str, Any])
    except ErasecError:
        return {}
    return record if record.get("program") == "erasec" else {}


def acquire(folder: Path) -> FileLock:
    """Make ``folder``, which only its owner can read, and hold its lock until it is released or the process ends.

    Raises ErasecError where another process holds the lock, where the folder is not ours, and where it cannot be made.
    """
    from filelock import FileLock, Timeout

    while True:
        try:
            with suppress(FileExistsError):
                folder.mkdir(PRIVATE_FOLDER, parents=False)
            if not is_ours(folder):
                raise _foreign_error(folder)
            lock = FileLock(folder / LOCK, WAIT_S, PRIVATE_FILE)
            lock.acquire()
        except FileNotFoundError:  # its owner removed it in the meantime
            if not folder.parent.is_dir():
                raise
            continue
        except Timeout as error:
            raise held_error(folder) from error
        try:
            _write_owner(folder)
        except BaseException:
            if set(os.listdir(folder)) <= BARE:
                remove_folder(folder)
            lock.release()
            raise
        return lock


def _write_owner(folder: Path) -> None:
    record = {
        "program": "erasec",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["erasec", *sys.argv[1:]])[:400],
    }
    (folder / NEW_OWNER).write_text(json.dumps(record), encoding="utf-8")
    os.replace(folder / NEW_OWNER, folder / OWNER)


def acquire_abandoned(folder: Path) -> FileLock | None:
    """The lock of a folder of ours that no process holds; None for any other folder, or where it cannot be locked."""
    if not is_ours(folder):
        return None
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, 0, PRIVATE_FILE)
    try:
        lock.acquire()
    except (OSError, Timeout):
        return None
    return lock


def check_not_held(folder: Path) -> None:
    """Raise ErasecError where another process holds the lock of ``folder``."""
    if not is_ours(folder) or not (folder / LOCK).exists():
        return
    if (lock := acquire_abandoned(folder)) is None:
        raise held_error(folder)
    lock.release()


def held_error(folder: Path) -> ErasecError:
    owner = _owner(folder)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
    return Unavailable(
        "another command is writing there",
        where=str(folder.parent / folder.name.removeprefix(".").removesuffix(".erasec")),
        why=f"{who}: {owner.get('command', '?')}" if owner else "it has just begun",
        fix="wait until it has ended, or give another path with --out",
    )


def _foreign_error(folder: Path) -> ErasecError:
    return Unavailable(
        f"{folder.name} is in the way",
        where=str(folder),
        why="erasec writes its unfinished output there, and something else has that name, or belongs to another user",
        fix="move it elsewhere, or give another path with --out",
    )


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours. The lock and the owner go last: without them, nobody could tell that it is ours."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in (LOCK, OWNER):
            remove(path)
    remove(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove a folder of ours with all that is in it, unless a process holds its lock."""
    if (lock := acquire_abandoned(folder)) is not None:
        remove_folder(folder)
        lock.release()


def sweep(parent: Path) -> None:
    """Remove the scratch folders in ``parent`` whose processes have ended."""
    with suppress(OSError):
        for entry in os.scandir(parent):
            if entry.name.startswith(SCRATCH) and entry.is_dir(follow_symlinks=False):
                remove_abandoned(Path(entry.path))


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` for the block, which removes it. A later ``sweep`` removes it if the process is killed."""
    folder = parent / f"{SCRATCH}{os.urandom(8).hex()}"
    lock = acquire(folder)
    try:
        yield folder
    finally:
        remove_folder(folder)
        lock.release()


@cache
def process_scratch() -> Path:
    """A folder in the system's temporary folder, which TMPDIR sets. It is removed when the process ends."""
    folder = Path(tempfile.gettempdir()) / f"{SCRATCH}{os.urandom(8).hex()}"
    with named_errors(folder):
        lock, process = acquire(folder), os.getpid()

    def end() -> None:
        if os.getpid() == process:  # not in a child that was forked
            remove_folder(folder)
            lock.release()

    atexit.register(end)
    return folder
