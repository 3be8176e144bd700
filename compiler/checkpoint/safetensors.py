"""Safetensors on disk: read lazily, write streamed, atomically and with the same bytes every time.

A merged checkpoint is its base with some tensors' bytes replaced, so the base's own header is kept to the byte and
nothing is re-serialised: libraries rename keys when they save (transformers 5 drops ``text_model.``), we do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 16 * 1024 * 1024
# The first 8 bytes, a header's length, of a file in the middle of an in-place edit: no loader accepts them.
BLANK = b"\xff" * 8
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``start`` and ``stop`` are offsets in the file, in bytes.

    Where ``transposed``, the bytes hold the transpose of a 2-D tensor of that ``shape``.
    """

    file: Path
    dtype: str
    shape: Shape
    start: int
    stop: int
    transposed: bool = False


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by key, and the metadata, of one safetensors file; no tensor is read.

    Raises ErasecError when it is damaged, in the middle of an in-place edit, or has a dtype that is not in ``DTYPES``.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == BLANK:
                raise ErasecError(
                    f"an in-place edit of {file.name} was interrupted", where=str(file),
                    why="until it is finished, its tensors may be partly old and partly new",
                    fix=f"erasec recover {file.parent}   finishes it from the journal that was left",
                )  # fmt: skip
            length = int.from_bytes(first, "little")
            if length > size - 8:
                raise ValueError(f"the header would be {length} bytes long in a file of {size}")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {
            key: Entry(file, item["dtype"], tuple(item["shape"]), *(8 + length + at for at in item["data_offsets"]))
            for key, item in header.items()
        }
        if unknown := {entry.dtype for entry in entries.values()} - set(DTYPES):
            raise ErasecError(
                f"{file.name} holds tensors of the dtype {min(unknown)}", why=f"those read are {', '.join(DTYPES)}",
                fix="use the model's float16 or float32 file", where=str(file),
            )  # fmt: skip
        end = max((entry.stop for entry in entries.values()), default=8 + length)
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(f"{file.name} is no whole safetensors file", why=str(error), where=str(file),
                          fix="fetch the file again and compare its size") from error  # fmt: skip
    return entries, metadata


def read_tensor(entry: Entry) -> Tensor:
    """One tensor as it is stored, contiguous and in memory of its own."""
    import torch

    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        data = bytearray(stream.read(entry.stop - entry.start))
    dtype = getattr(torch, DTYPES[entry.dtype])
    if not data:
        return torch.zeros(entry.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype)
    return flat.reshape(entry.shape[::-1]).T.contiguous() if entry.transposed else flat.reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes in the order that safetensors keeps."""
    return bytes(_view(tensor))


def _view(tensor: Tensor) -> memoryview:
    """``tensor_bytes`` without a copy where the tensor is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: Tensor) -> str:
    """A tensor's dtype as a safetensors header names it. Raises ErasecError for one that is not written here."""
    name = str(tensor.dtype).removeprefix("torch.")
    for short, long in DTYPES.items():
        if long == name:
            return short
    raise ErasecError(f"a tensor of {name} cannot be written", why=f"supported: {', '.join(DTYPES.values())}")


def made(key: str, dtype: str, shape: Shape, make: Callable[[], Tensor]) -> memoryview:
    """The bytes of the tensor that ``make`` gives. Raises ErasecError where it is not of this dtype and shape."""
    tensor = make()
    if tuple(tensor.shape) != shape or dtype_name(tensor) != dtype:
        raise ErasecError(
            f"the new {key} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}",
            why=f"the file has {DTYPES[dtype]} {shape} for it, and an edit keeps dtypes and shapes",
        )
    return _view(tensor)


@contextmanager
def atomic(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Until then only its owner can read it; ``mode`` is what it has in the end.

    Where ``path`` is a link, the file it points to is replaced, as a plain write would. Open it with "r+": ext4 waits
    for the disk when a file is closed that was truncated ("w"), which doubles the time of a large copy.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stream(
    path: Path,
    tensors: Mapping[str, tuple[str, Shape, Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
    mode: int = 0o644,
) -> None:
    """Write a new safetensors file: tensors and metadata sorted, so the same content is the same bytes.

    Tensors go by the size of their items, largest first, and then by key: each begins at a multiple of that size, which
    those who map the file need. ``tensors`` maps keys to (dtype as the header names it, shape, function that gives the
    tensor); the functions are called in order and one at a time, so that one tensor is in memory. Raises ErasecError
    where one gives another.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    position = 0
    sizes = {key: getattr(torch, DTYPES[dtype]).itemsize for key, (dtype, _, _) in tensors.items()}
    order = sorted(tensors, key=lambda key: (-sizes[key], key))
    for key in order:
        dtype, shape, _ = tensors[key]
        end = position + math.prod(shape) * sizes[key]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path, mode) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(made(key, *tensors[key]))


def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, mode: int = 0o644
) -> None:
    """``stream`` of tensors that are in memory already."""
    stream(path, {k: (dtype_name(v), tuple(v.shape), v.contiguous) for k, v in tensors.items()}, metadata, mode)


def patch(base: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write ``base`` to ``path`` with some tensors replaced; every other byte, header included, is copied.

    ``changed`` maps keys to functions, called one at a time, that give the new tensor in the base's shape and dtype.
    Peak memory is one chunk or one changed tensor.
    """
    size = base.stat().st_size
    entries, _ = read_header(base)
    if missing := set(changed) - set(entries):
        raise ErasecError(f"{base.name} has no tensor {sorted(missing)[0]!r}", where=str(base))
    done = 0
    with atomic(path) as temporary, FileIO(base) as source, FileIO(temporary, "r+") as target:
        for key in sorted(changed, key=lambda key: entries[key].start):
            entry = entries[key]
            _copy(source, target, done, entry.start)
            _write(target, made(key, entry.dtype, entry.shape, changed[key]))
            done = entry.stop
        _copy(source, target, done, size)
        written = {key: replace(entry, file=base) for key, entry in read_header(temporary)[0].items()}
        if written != entries or temporary.stat().st_size != size:
            raise ErasecError(
                f"{path.name} was not written as {base.name} is", why="its keys, dtypes, shapes or size are others",
                fix="the disk or the base changed meanwhile: look at both, and try again",
            )  # fmt: skip


def copy(source: Path, path: Path) -> None:
    """Copy a file's bytes to ``path``, whole or not at all; a file that was there is replaced, not written into."""
    with atomic(path) as temporary, FileIO(source) as old, FileIO(temporary, "r+") as new:
        _copy(old, new, 0, source.stat().st_size)


def hard_link(source: Path, path: Path) -> None:
    """Make ``path`` a hard link to a file, in place of what was there; a copy where the file system has no links."""
    temporary = path.with_name(f".{path.name}.link")
    try:
        os.link(source.resolve(), temporary)
        os.replace(temporary, path)
    except OSError:
        copy(source, path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: FileIO, target: FileIO, start: int, stop: int) -> None:
    """Append bytes ``start`` to ``stop`` of one file to another, inside the kernel where the file systems can."""
    while start < stop:
        count = min(stop - start, CHUNK - start % CHUNK)  # whole pages, which copy a third faster
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, start)
        except (OSError, AttributeError):  # not between these file systems; not on this one. A real fault comes again.
            copied = 0
        if not copied:
            source.seek(start)
            data = source.read(count)
            if not data:
                raise ErasecError(
                    f"{source.name!s} ends {stop - start} bytes early", why="it changed while it was read"
                )
            _write(target, data)
            copied = len(data)
        start += copied


def _write(target: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_digest(entries: Mapping[str, Entry]) -> str:
    """sha256 over sorted (key, dtype, shape, bytes): the same for the same tensors, however the file is laid out."""
    digest = hashlib.sha256()
    with bar("digest", len(entries)) as advance:
        for key, entry in sorted(entries.items()):
            digest.update(f"{key} {entry.dtype} {entry.shape}\n".encode())
            if entry.transposed:
                digest.update(_view(read_tensor(entry)))
            else:
                with entry.file.open("rb") as stream:
                    stream.seek(entry.start)
                    for left in range(entry.stop - entry.start, 0, -CHUNK):
                        digest.update(stream.read(min(left, CHUNK)))
            advance()
    return digest.hexdigest()
