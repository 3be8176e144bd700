"""The disk: modes of new files, atomic exchange of paths, what must survive a power loss, and errors of a full disk.

Every file and folder that erasec makes has the mode that the umask gives it: 0666 and 0777 without its bits. What is
private (keys, the state of training, working folders) has 0600 and 0700.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from erasec.errors import ErasecError

FILE, FOLDER = 0o666, 0o777  # the kernel takes the bits of the umask away
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
FULL = (errno.ENOSPC, errno.EDQUOT)
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
SIZE = r"^\d+(\.\d+)?\s?([kMG]i?)?B?$"
AT_FDCWD = -100
RENAME_EXCHANGE = 2
# What a kernel or a file system that cannot exchange two paths answers.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def new_file(folder: Path, name: str, private: bool = False) -> Path:
    """Create an empty file with a hidden, unused name that contains ``name``."""
    while True:
        path = folder / f".{name}.{os.urandom(4).hex()}"
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE if private else FILE))
            return path


def exchange(a: Path, b: Path) -> bool:
    """Swap two paths of one file system at once. False, and nothing done, where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def sync(path: Path) -> None:
    """Write a file, or a folder with all that is in it, to the disk, so that it survives a power loss."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            sync(inside)
        sync_folder(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk, where the file system supports it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as possible."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def bytes_in(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 where there is none."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file())


def existing(path: Path) -> Path:
    """The nearest folder of ``path`` that exists, ``path`` itself included."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """The bytes that this user may still write on the disk of ``path``, which need not exist."""
    return shutil.disk_usage(existing(path)).free


def mount_point(path: Path) -> Path:
    """The folder at which the disk of ``path`` is mounted."""
    path = existing(path)
    return next(folder for folder in (path, *path.parents) if os.path.ismount(folder))


class DiskFull(ErasecError):
    """There is no space for ``path``. ``left`` are the bytes that are still to be written, 0 where it is not known."""

    def __init__(self, path: Path, left: int = 0) -> None:
        self.path, self.left = path, left
        free = free_bytes(path.parent)
        why = f"{size(free)} are free"
        if left:
            why += f", and {size(left)} are still to be written: {size(max(left - free, 1))} more are needed"
        super().__init__(
            f"no space left on the disk at {mount_point(path.parent)}",
            why=why,
            where=str(path),
            fix="free some space, or use another disk: --out for the output, TMPDIR for temporary files, ERASEC_CACHE "
            "for the cache",
        )


def size(count: float) -> str:
    """A number of bytes in decimal units, with three significant digits."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{float(f'{value:.3g}'):g} {unit}"


def parse_size(text: str, option: str) -> int:
    """The bytes of a text such as "8GB". Raises ErasecError, which names the ``option``, where it is no size."""
    if not re.match(SIZE, text) or not (value := float(re.match(r"[\d.]+", text)[0])):  # type: ignore[index]
        raise ErasecError(f"{text!r} is no size", fix=f"write a number and a unit, such as {option}8GB")
    unit = re.sub(r"[\d.\s]|B$", "", text)
    return int(value * UNITS[unit])


@contextmanager
def named_errors(path: Path, written: Path | None = None, total: int = 0) -> Iterator[None]:
    """Turn an OSError of a full disk in the block into DiskFull, and name the file in that of a file that is too large.

    ``total`` are the bytes that the block writes in all, 0 where it is not known, and ``written`` is where it writes
    them, ``path`` by default.
    """
    written = written or path
    try:
        yield
    except DiskFull as error:
        if not error.path.is_relative_to(written):  # another disk, such as that of TMPDIR
            raise
        raise DiskFull(_final(error.path, written, path), max(error.left, total - bytes_in(written))) from error
    except OSError as error:
        if error.errno == errno.EFBIG and error.filename is None:
            error.filename = str(path)
        if error.errno not in FULL:
            raise
        file = path if error.filename is None else _final(Path(os.fsdecode(error.filename)), written, path)
        raise DiskFull(file, max(total - bytes_in(written), 0)) from error


def _final(file: Path, written: Path, path: Path) -> Path:
    """The name of a ``file`` in ``written`` after ``written`` has become ``path``."""
    return path / file.relative_to(written) if file.is_relative_to(written) else file
