"""Safetensors files: lazy reading; streamed, atomic and reproducible writing.

A merged checkpoint is its base with the bytes of some tensors replaced. The header of the base is copied byte for byte
and nothing is serialised again, because libraries rename tensors when they save (transformers 5 drops ``text_model.``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import Check
from erasec.checkpoint.disk import named_errors, new_file, sync
from erasec.checkpoint.quantised import refuse_dtypes, refuse_gguf
from erasec.documents import POINTER, refuse_pointer
from erasec.errors import ErasecError, shown
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.family import Shape

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FLOATS = ("F64", "F32", "F16", "BF16")
CHUNK = 16 * 1024 * 1024
# The first 8 bytes (the length of the header) of a file during an in-place edit. No loader accepts them.
BLANK = b"\xff" * 8


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. ``start`` and ``stop`` are byte offsets.

    If ``transposed``, the bytes are those of the transpose of a 2-D tensor with this ``shape``; if ``swapped``, those
    of the tensor whose first and second half of rows have changed places.
    """

    file: Path
    dtype: str
    shape: Shape
    start: int
    stop: int
    transposed: bool = False
    swapped: bool = False


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries by tensor name, and the metadata, of a safetensors file. No tensor is read.

    The library safetensors judges the header first, so that no file is accepted here that others refuse. Raises
    ErasecError if the file is damaged, has an unfinished in-place edit, is a GGUF file, or has a dtype not in DTYPES.
    """
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as handle:
        first = handle.read(len(POINTER))
        refuse_pointer(file, first)
        refuse_gguf(file, first)
        if first[:8] == BLANK:
            raise ErasecError(
                f"an in-place edit of {file.name} was interrupted",
                where=str(file),
                why="until the edit is finished, its tensors may be partly old and partly new",
                fix=f"erasec recover {file.parent}   finishes it with its journal",
            )
        try:
            with safe_open(file, "np"):  # maps the file, and reads the header alone
                pass
        except SafetensorError as error:
            raise _damaged(file, str(error).removeprefix("Error while deserializing header: ")) from error
        length = int.from_bytes(first[:8], "little")
        handle.seek(8)
        text = handle.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            key: Entry(file, item["dtype"], tuple(item["shape"]), *(8 + length + at for at in item["data_offsets"]))
            for key, item in header.items()
        }
    except TypeError as error:  # the library accepts an entry without names, as a list
        raise _damaged(file, "the entry of a tensor is not a table") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    refuse_dtypes(file, (entry.dtype for entry in entries.values()), DTYPES)
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of a header. The format forbids a name that is there twice; of two, libraries take one or the other."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"its header has {shown(name)} twice")
        table[name] = value
    return table


def _damaged(file: Path, why: str) -> ErasecError:
    return ErasecError(
        f"{file.name} is no whole safetensors file",
        why=why,
        where=str(file),
        fix="fetch the file again and compare its size",
    )


def read_bytes(entry: Entry) -> bytearray:
    """The stored bytes of one tensor, halves in the tensor's order. Raises ErasecError if the file became shorter."""
    size = entry.stop - entry.start
    with entry.file.open("rb") as handle:
        handle.seek(entry.start)
        data = bytearray(size)
        if handle.readinto(data) < size:
            raise _damaged(entry.file, "it became shorter while it was read")
    return data[size // 2 :] + data[: size // 2] if entry.swapped else data


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor in its stored dtype, as a contiguous copy in memory."""
    import torch

    data = read_bytes(entry)
    dtype = getattr(torch, DTYPES[entry.dtype])
    if not data:
        return torch.zeros(entry.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype)
    return flat.reshape(entry.shape[::-1]).T.contiguous() if entry.transposed else flat.reshape(entry.shape)


def read_named(entries: Mapping[str, Entry], name: str) -> Tensor:
    """Read one tensor by the name that a file's metadata gives. Raises ErasecError where there is none."""
    if name not in entries:
        file = next((entry.file for entry in entries.values()), None)
        raise ErasecError(
            f"{file.name if file else 'the file'} is damaged",
            why=f"it has no tensor {shown(name)}, which its metadata names",
            where=str(file or ""),
            fix="fetch the file again",
        )
    return read_tensor(entries[name])


def read_finite(entries: Mapping[str, Entry], name: str) -> Tensor:
    """``read_named`` for a tensor of finite floats. Raises ErasecError where it is another one."""
    tensor, entry = read_named(entries, name), entries[name]
    if entry.dtype not in FLOATS or not bool(tensor.isfinite().all()):
        raise ErasecError(
            f"the tensor {name} of {entry.file.name} is not finite",
            why="it has a NaN or an infinity" if entry.dtype in FLOATS else f"it is {DTYPES[entry.dtype]}",
            where=str(entry.file),
            fix="fetch the file again, or make it again",
        )
    return tensor


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor as safetensors stores them, in row-major order."""
    return bytes(_byte_view(tensor))


def _byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype in a safetensors header. Raises ErasecError for an unsupported dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    for header_name, torch_name in DTYPES.items():
        if torch_name == name:
            return header_name
    raise ErasecError(f"a tensor of {name} cannot be written", why=f"supported: {', '.join(DTYPES.values())}")


def checked_data(key: str, dtype: str, shape: Shape, make: Callable[[], Tensor]) -> memoryview:
    """The bytes of the tensor that ``make`` returns. Raises ErasecError if it has another dtype or shape."""
    tensor = make()
    if tuple(tensor.shape) != shape or dtype_name(tensor) != dtype:
        raise ErasecError(
            f"the new {key} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}",
            why=f"in the file it is {DTYPES[dtype]} {shape}, and edits keep dtypes and shapes",
        )
    return _byte_view(tensor)


@contextmanager
def atomic_write(path: Path, private: bool = False, durable: bool = False, total: int = 0) -> Iterator[Path]:
    """A temporary file next to ``path`` that replaces it when the block ends, or is deleted if the block raises.

    Only the owner can read a ``private`` file, at any time. A ``durable`` file is on the disk before it replaces the
    old one, so that a power loss leaves either; what an ``Output`` publishes needs no such care. ``total`` are the
    bytes that will be written, 0 where it is not known: an error of a full disk states how many are missing.

    If ``path`` is a link, the file that it points to is replaced. Open the temporary file with "r+": with "w", ext4
    flushes a truncated file to disk when it is closed, which doubles the time of a large copy.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_file(path.parent, path.name, private)
    try:
        with named_errors(path, temporary, total):
            yield temporary
            if durable:
                sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stream_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, Shape, Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
    private: bool = False,
    durable: bool = False,
) -> None:
    """Write a safetensors file; ``private`` and ``durable`` as in ``atomic_write``. The same content always gives the
    same bytes.

    ``tensors`` maps names to (dtype as in the header, shape, function that returns the tensor). The functions are
    called one at a time, so that one tensor is in memory. Tensors are sorted by the size of their items, largest first,
    and then by name. Each tensor thus starts at a multiple of its item size, which memory-mapping readers need. Raises
    ErasecError if a function returns a tensor of another dtype or shape.
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
    head = _head(header)
    with (
        atomic_write(path, private, durable, len(head) + position) as temporary,
        temporary.open("r+b") as file,
    ):
        file.write(head)
        for key in order:
            file.write(checked_data(key, *tensors[key]))


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    private: bool = False,
    durable: bool = False,
) -> None:
    """Write tensors that are in memory, as ``stream_tensors`` does."""
    makers = {key: (dtype_name(value), tuple(value.shape), value.contiguous) for key, value in tensors.items()}
    stream_tensors(path, makers, metadata, private, durable)


def patch_file(
    base: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``base`` to ``path`` with some tensors replaced. All other bytes are copied, including the header, unless
    there is new ``metadata`` for it.

    ``changed`` maps tensor names to functions that return the new tensor in the dtype and shape of the old one. They
    are called one at a time; peak memory is one chunk or one changed tensor. Raises ErasecError for an unknown tensor
    and for another dtype or shape.
    """
    size = base.stat().st_size
    entries, old = read_header(base)
    if missing := set(changed) - set(entries):
        raise ErasecError(f"{base.name} has no tensor {sorted(missing)[0]!r}", where=str(base))
    done, head = (0, b"") if metadata is None else _new_head(base, metadata)
    moved = len(head) - done
    with atomic_write(path, total=size) as temporary, FileIO(base) as source, FileIO(temporary, "r+") as target:
        _write(target, head)
        for key in sorted(changed, key=lambda key: entries[key].start):
            entry = entries[key]
            _copy(source, target, done, entry.start)
            _write(target, checked_data(key, entry.dtype, entry.shape, changed[key]))
            done = entry.stop
        _copy(source, target, done, size)
        written, stated = read_header(temporary)
        places = {
            key: replace(entry, file=temporary, start=entry.start + moved, stop=entry.stop + moved)
            for key, entry in entries.items()
        }
        if (written, stated, temporary.stat().st_size) != (places, metadata or old, size + moved):
            raise ErasecError(
                f"{path.name} was not written as {base.name} is",
                why="its tensor names, dtypes, shapes or size differ",
                fix="check the disk and whether the base has changed meanwhile, then try again",
            )


def _new_head(file: Path, metadata: Mapping[str, str]) -> tuple[int, bytes]:
    """Where the tensors of a file begin, and all bytes before them with other metadata."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    return 8 + length, _head({**header, "__metadata__": dict(sorted(metadata.items()))})


def _head(header: Mapping[str, Any]) -> bytes:
    """The length of a header and its text, padded so that tensors begin at a multiple of 8."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_file(source: Path, path: Path) -> None:
    """Copy a file to ``path``, completely or not at all. An existing file is replaced, so its other hard links keep
    their content."""
    size = source.stat().st_size
    with atomic_write(path, total=size) as temporary, FileIO(source) as old, FileIO(temporary, "r+") as new:
        _copy(old, new, 0, size)


def hard_link(source: Path, path: Path) -> None:
    """Replace ``path`` by a hard link to ``source``, or by a copy if the file system does not support hard links."""
    temporary = path.with_name(f".{path.name}.link")
    try:
        os.link(source.resolve(), temporary)
        os.replace(temporary, path)
    except OSError:
        copy_file(source, path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: FileIO, target: FileIO, start: int, stop: int) -> None:
    """Append the bytes from ``start`` to ``stop`` of ``source`` to ``target``, inside the kernel if possible."""
    while start < stop:
        count = min(stop - start, CHUNK - start % CHUNK)  # aligned to pages, which is a third faster
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, start)
        except (OSError, AttributeError):  # unsupported by these file systems or this system; real faults occur again
            copied = 0
        if not copied:
            source.seek(start)
            data = source.read(count)
            if not data:
                raise ErasecError(
                    f"{source.name!s} ends {stop - start} bytes early",
                    why="it changed while it was read",
                    fix="try again when no other program writes it",
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
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_digest(entries: Mapping[str, Entry], changed: Mapping[str, Callable[[], Tensor]] | None = None) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes). It does not depend on the layout of the file.

    ``changed`` are functions by tensor name, as in ``patch_file``: their tensors take the place of the stored ones.
    """
    return _digest(
        {
            key: (entry.dtype, entry.shape, partial(_made, key, entry, changed[key]))
            if changed and key in changed
            else (entry.dtype, entry.shape, partial(_stored, entry))
            for key, entry in entries.items()
        }
    )


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The ``content_digest`` that a file of tensors in memory will have."""
    return _digest({key: (dtype_name(v), tuple(v.shape), partial(_whole, v)) for key, v in tensors.items()})


def _digest(tensors: Mapping[str, tuple[str, Shape, Callable[[], Iterable[bytes | memoryview]]]]) -> str:
    """``content_digest`` of tensors by name, each as its dtype, its shape and a function that returns its bytes."""
    digest = hashlib.sha256()
    with bar("digest", len(tensors)) as advance:
        for key, (dtype, shape, chunks) in sorted(tensors.items()):
            digest.update(f"{key} {dtype} {shape}\n".encode())
            for chunk in chunks():
                digest.update(chunk)
            advance()
    return digest.hexdigest()


def _stored(entry: Entry) -> Iterator[bytes | memoryview]:
    """The bytes of a stored tensor in chunks."""
    if entry.transposed or entry.swapped:
        yield _byte_view(read_tensor(entry))
        return
    with entry.file.open("rb") as handle:
        handle.seek(entry.start)
        for remaining in range(entry.stop - entry.start, 0, -CHUNK):
            yield handle.read(min(remaining, CHUNK))


def _made(key: str, entry: Entry, make: Callable[[], Tensor]) -> Iterator[memoryview]:
    """The bytes of the tensor that takes the place of a stored one, as one chunk."""
    yield checked_data(key, entry.dtype, entry.shape, make)


def _whole(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in memory, as one chunk."""
    yield _byte_view(tensor)


def finite_check(name: str, entries: Mapping[str, Entry]) -> Check:
    """A check that counts the floating-point tensors with a NaN or an infinity. It reads one at a time."""
    floats = {key: entry for key, entry in entries.items() if entry.dtype in FLOATS}
    faults = [key for key, entry in floats.items() if not bool(read_tensor(entry).isfinite().all())]
    how = f"tensors with a NaN or an infinity; all {len(floats)} floating tensors read from disk"
    return Check.count(name, faults, how)
