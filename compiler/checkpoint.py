"""Safetensors on disk: read lazily, write streamed, atomically and with the same bytes every time.

A merged checkpoint is its base with some tensors' bytes replaced, so the base's own header is kept to the byte and
nothing is re-serialised: libraries rename keys when they save (transformers 5 drops ``text_model.``), we do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    Changed = Mapping[str, Mapping[str, Callable[[], Tensor]]]  # new tensors by component and key

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
CHUNK = 16 * 1024 * 1024
WEIGHTS = ("diffusion_pytorch_model", "model")
COPIES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
# The first 8 bytes, a header's length, of a file in the middle of an in-place edit: no loader accepts them.
BLANK = b"\xff" * 8
# stem[.variant].safetensors, or an index of shards with the variant before or after "safetensors.index"; no shard.
WEIGHT_NAME = re.compile(
    rf"({'|'.join(WEIGHTS)})(?:\.((?:(?!-\d+-of-)[^.])+))?\.safetensors(\.index(?:\.([^.]+))?\.json)?"
)
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
    """Entries by key, and the metadata, of one safetensors file; no tensor is read. Raises ErasecError when damaged."""
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
            raise ValueError(f"it holds the dtype {min(unknown)}, which is not read here")
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
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

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
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stream(
    path: Path,
    tensors: Mapping[str, tuple[str, Shape, Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new safetensors file: keys and metadata sorted, so the same content is the same bytes.

    ``tensors`` maps keys to (dtype as the header names it, shape, function that gives the tensor); the functions are
    called in order and one at a time, so that one tensor is in memory. Raises ErasecError where one gives another.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    position = 0
    for key, (dtype, shape, _) in sorted(tensors.items()):
        end = position + math.prod(shape) * getattr(torch, DTYPES[dtype]).itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, (dtype, shape, make) in sorted(tensors.items()):
            file.write(made(key, dtype, shape, make))


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """``stream`` of tensors that are in memory already."""
    stream(path, {k: (dtype_name(v), tuple(v.shape), v.contiguous) for k, v in tensors.items()}, metadata)


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


def _variants(folder: Path) -> dict[str, Path]:
    """By variant ("" is the plain one), the file of weights or the index of its shards; an index goes first."""
    found: dict[str, Path] = {}
    names = [match for path in folder.glob("*.safetensors*") if (match := WEIGHT_NAME.fullmatch(path.name))]
    for match in sorted(names, key=lambda match: (match[1], match[3] is None)):
        found.setdefault(match[2] or match[4] or "", folder / match.string)
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index of shards names. Raises ErasecError where it is damaged or one of them is not there."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(f"{index.name} is no index of shards", why=repr(error), where=str(index)) from error
    if lost := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise ErasecError(
            f"the weights are not whole: {lost[0]} is not there", why=f"{index.name} names {len(names)} shards",
            fix="fetch the missing files", where=str(index.parent),
        )  # fmt: skip
    return tuple(index.parent / name for name in names)


@dataclass(frozen=True)
class Folder:
    """A diffusers folder: model_index.json and a subfolder per component. Nothing is read until it is asked for.

    ``variant`` chooses among a component's weights, such as "fp16"; a component without it has its plain ones taken.
    """

    root: Path
    variant: str = ""

    @cached_property
    def index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((self.root / "model_index.json").read_text())
        return index

    def files(self) -> tuple[Path, ...]:
        """Every file of the folder, relative, sorted; hidden ones (caches, locks) left out."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return tuple(sorted(path for path in found if not any(part.startswith(".") for part in path.parts)))

    def prepare(self) -> None:
        """Make what a build will need and is not there; a folder has it all."""

    def size(self) -> int:
        """Bytes of all its files."""
        return sum((self.root / name).stat().st_size for name in self.files())

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.root / component / name).read_text())
        return config

    def weights(self, component: str) -> Path:
        """The file of a component's weights, or the index of its shards. Raises ErasecError where none can be chosen.

        Without ``variant`` the plain ones, or else those of the only variant there is.
        """
        folder = self.root / component
        found = _variants(folder)
        if self.variant and not any(self.variant in _variants(path) for path in self.root.glob("*/")):
            raise ErasecError(
                f"no component has the variant {self.variant!r}", where=str(self.root),
                why=f"{component} has: {', '.join(name or 'the plain one' for name in found) or 'no safetensors'}",
            )  # fmt: skip
        only = next(iter(found.values())) if len(found) == 1 and not self.variant else None
        if chosen := found.get(self.variant) or found.get("") or only:
            return chosen
        raise self._no_weights(folder, sorted(found))

    def variant_of(self, component: str) -> str:
        """The variant that is taken of a component's weights; "" for the plain ones."""
        chosen = self.weights(component)
        return next(name for name, path in _variants(self.root / component).items() if path == chosen)

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files that hold a component's weights. Raises ErasecError where there are only pickles."""
        chosen = self.weights(component)
        return _shards(chosen) if chosen.suffix == ".json" else (chosen,)

    def _no_weights(self, folder: Path, variants: list[str]) -> ErasecError:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why, fix = "it has no weights", "fetch or save the model with safetensors: pipe.save_pretrained(DIR)"
        if variants:
            why = f"it has only variants ({', '.join(variants)})"
            fix = f'choose one: variant = "{variants[0]}" in the recipe, or --variant {variants[0]}'
        elif pickles:
            why = f"it has only pickled weights ({', '.join(pickles)}), which can run code when opened"
            fix = "pass --allow-pickle (only tensors are read, nothing is run), or save it again with safetensors"
        return ErasecError(f"no safetensors weights for {folder.name}", why=why, fix=fix, where=str(folder))

    def entries(self, component: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for file in self.weight_files(component):
            entries = read_header(file)[0]
            if twice := found.keys() & entries.keys():
                raise ErasecError(
                    f"{component} has {min(twice)} twice", why=f"in {found[min(twice)].file.name} and in {file.name}",
                    where=str(file.parent), fix="fetch the model again",
                )  # fmt: skip
            found |= entries
        return found

    def doubles(self, components: Iterable[str]) -> tuple[Path, ...]:
        """Relative paths of further copies of these components' weights: other precisions, pickles, single files."""
        used = {file.relative_to(self.root) for name in components for file in self.weight_files(name)}
        used |= {self.weights(name).relative_to(self.root) for name in components}
        folders = {Path(), *(Path(component) for component in components)}
        return tuple(
            name
            for name in self.files()
            if name.parent in folders and name not in used and "optimizer" not in name.name
            and (name.suffix in COPIES or (".index." in name.name and name.suffix == ".json"))
        )  # fmt: skip

    def placed(self, changed: Changed) -> dict[Path, dict[str, Callable[[], Tensor]]]:
        """``changed[component][key]`` by the file that holds each tensor, and its key there."""
        placed: dict[Path, dict[str, Callable[[], Tensor]]] = {}
        for component, tensors in changed.items():
            entries = self.entries(component)
            for key, make in tensors.items():
                placed.setdefault(entries[key].file, {})[key] = make
        return placed

    def write(self, out: Path, changed: Changed, link: bool = False) -> None:
        """Copy the folder to ``out`` with tensors replaced, ``changed[component][key]``; other files byte for byte.

        ``doubles`` of the changed components are left out: they would bring back what was edited. With ``link``, other
        files are hard links where the file system allows it. Raises ErasecError where ``out`` is this folder.
        """
        if out.resolve() == self.root.resolve():
            raise ErasecError(f"{out} is the model itself", why="it would be overwritten", fix="give another folder")
        patched = self.placed(changed)
        names = sorted(set(self.files()) - set(self.doubles(changed)))
        with bar("write", len(names)) as advance:
            for name in names:
                source, target = self.root / name, out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source in patched:
                    patch(source, target, patched[source])
                elif not link or not _linked(source.resolve(), target):
                    copy(source, target)
                advance(note=name.name)


def _linked(source: Path, target: Path) -> bool:
    """Make ``target`` a hard link to ``source``; False where the file system cannot."""
    temporary = target.with_name(f".{target.name}.link")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


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
