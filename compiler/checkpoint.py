"""Safetensors on disk: read lazily, write streamed, atomically and with the same bytes every time.

A merged checkpoint is its base with some tensors' bytes replaced, so the base's own header is kept to the byte and
nothing is re-serialised: libraries rename keys when they save (transformers 5 drops ``text_model.``), we do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
CHUNK = 16 * 1024 * 1024
WEIGHTS = ("diffusion_pytorch_model", "model")
COPIES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``start`` and ``stop`` are offsets in the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by key, and the metadata, of one safetensors file; no tensor is read. Raises ErasecError when damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
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
    """One tensor as it is stored, in memory of its own."""
    import torch

    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        data = bytearray(stream.read(entry.stop - entry.start))
    dtype = getattr(torch, DTYPES[entry.dtype])
    if not data:
        return torch.zeros(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    import torch

    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Where ``path`` is a link, the file it points to is replaced, as a plain write would.
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


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a new safetensors file: keys and metadata sorted, so the same content is the same bytes."""
    names = {value: key for key, value in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    position = 0
    for key, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.element_size()
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            stream.write(tensor_bytes(tensor))


def patch(base: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write ``base`` to ``path`` with some tensors replaced; every other byte, header included, is copied.

    ``changed`` maps keys to functions, called one at a time, that give the new tensor in the base's shape and dtype.
    Peak memory is one chunk or one changed tensor.
    """
    entries, _ = read_header(base)
    if missing := set(changed) - set(entries):
        raise ErasecError(f"{base.name} has no tensor {sorted(missing)[0]!r}", where=str(base))
    order = sorted(changed, key=lambda key: entries[key].start)
    with atomic(path) as temporary, base.open("rb") as source, temporary.open("wb") as stream:
        for key in order:
            entry = entries[key]
            _copy(source, stream, entry.start - source.tell())
            tensor = changed[key]()
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != entry.shape or dtype != DTYPES[entry.dtype]:
                raise ErasecError(
                    f"the new {key} is {dtype} {tuple(tensor.shape)}",
                    why=f"the base has {DTYPES[entry.dtype]} {entry.shape}, and an edit keeps dtypes and shapes",
                )
            stream.write(tensor_bytes(tensor))
            source.seek(entry.stop)
        _copy(source, stream, base.stat().st_size - source.tell())


def _copy(source: Any, stream: Any, count: int) -> None:
    while count:
        data = source.read(min(count, CHUNK))
        if not data:
            raise ErasecError(f"{source.name} ends {count} bytes early", why="it changed while it was read")
        stream.write(data)
        count -= len(data)


@dataclass(frozen=True)
class Folder:
    """A diffusers folder: model_index.json and a subfolder per component. Nothing is read until it is asked for."""

    root: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((self.root / "model_index.json").read_text())
        return index

    def files(self) -> tuple[Path, ...]:
        """Every file of the folder, relative, sorted; hidden ones (caches, locks) left out."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return tuple(sorted(path for path in found if not any(part.startswith(".") for part in path.parts)))

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.root / component / name).read_text())
        return config

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """The safetensors files that hold a component's weights. Raises ErasecError where there are only pickles."""
        folder = self.root / component
        for stem in WEIGHTS:
            shards = folder / f"{stem}.safetensors.index.json"
            if shards.is_file():
                names = set(json.loads(shards.read_text())["weight_map"].values())
                return tuple(folder / name for name in sorted(names))
            if (folder / f"{stem}.safetensors").is_file():
                return (folder / f"{stem}.safetensors",)
        variants = sorted(path.name for path in folder.glob("*.safetensors"))
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = "it has no weights"
        if variants:
            why = f"it has only variants ({', '.join(variants)})"
        elif pickles:
            why = f"it has only pickled weights ({', '.join(pickles)}), which can run code when opened"
        raise ErasecError(
            f"no safetensors weights for {component}", why=why, where=str(folder),
            fix="fetch or save the model with safetensors: pipe.save_pretrained(DIR, safe_serialization=True)",
        )  # fmt: skip

    def entries(self, component: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for file in self.weight_files(component):
            found |= read_header(file)[0]
        return found

    def doubles(self, components: Iterable[str]) -> tuple[Path, ...]:
        """Relative paths of further copies of these components' weights: other precisions, pickles, single files."""
        used = {file.relative_to(self.root) for component in components for file in self.weight_files(component)}
        folders = {Path(), *(Path(component) for component in components)}
        return tuple(
            name
            for name in self.files()
            if name.parent in folders and name not in used and name.suffix in COPIES and "optimizer" not in name.name
        )

    def write(self, out: Path, changed: Mapping[str, Mapping[str, Callable[[], Tensor]]]) -> None:
        """Copy the folder to ``out`` with tensors replaced, ``changed[component][key]``; other files byte for byte.

        ``doubles`` of the changed components are left out: they would bring back what was edited.
        """
        patched: dict[Path, Mapping[str, Callable[[], Tensor]]] = {}
        for component, tensors in changed.items():
            entries = self.entries(component)
            for key, make in tensors.items():
                patched.setdefault(entries[key].file, {})
                patched[entries[key].file] = {**patched[entries[key].file], key: make}
        names = sorted(set(self.files()) - set(self.doubles(changed)))
        with bar("write", len(names)) as advance:
            for name in names:
                source, target = self.root / name, out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source in patched:
                    patch(source, target, patched[source])
                else:
                    shutil.copyfile(source, target)
                advance(note=name.name)


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
            with entry.file.open("rb") as stream:
                stream.seek(entry.start)
                for left in range(entry.stop - entry.start, 0, -CHUNK):
                    digest.update(stream.read(min(left, CHUNK)))
            advance()
    return digest.hexdigest()
