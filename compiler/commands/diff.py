"""Which tensors moved between two checkpoints, by how much, and the rank of the difference."""

from __future__ import annotations

import filecmp
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.folder import WEIGHTS
from erasec.checkpoint.safetensors import CHUNK, DTYPES, Entry, read_header, read_tensor
from erasec.errors import ErasecError
from erasec.model.view import BUNDLED, bundled
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One tensor or file that is not the same. ``kind`` is "moved" or "dtype" (both with numbers where the shapes
    agree), "shape", "only in A", "only in B", or "file" for files that hold no weights.

    ``change`` is |B - A| / |A| in Frobenius norms, inf where A is zero; ``largest`` the largest absolute change;
    ``rank`` that of B - A above the noise of rounding, for matrices and convolutions as (d_out, rest); None else.
    """

    kind: str
    key: str
    note: str = ""
    change: float | None = None
    largest: float | None = None
    rank: int | None = None


def locate(name: str) -> Path:
    """A folder or file by path, a bundled model by name; of a build's output folder, its plain checkpoint ``hf``."""
    path = Path(name).expanduser()
    if not path.exists():
        if name in BUNDLED:
            return bundled(name)
        raise ErasecError(f"there is no folder or file {name}", fix=f"give paths, or one of {', '.join(BUNDLED)}")
    return path / "hf" if (path / "hf" / "model_index.json").is_file() else path


def compare(a: Path, b: Path) -> list[Difference]:
    """Differences of two folders, or of two safetensors files, in order of their keys; empty where nothing differs.

    Tensors are compared as bytes first, and only those that differ are read, one at a time, in float64. Shards of one
    checkpoint are taken together. Raises ErasecError for a damaged file, or a folder beside a file.
    """
    if a.is_dir() != b.is_dir():
        raise ErasecError("a folder cannot be compared with a file", why=f"{a} and {b}",
                          fix="give two folders, or two .safetensors files")  # fmt: skip
    ours, theirs = _tensors(a), _tensors(b)
    if not ours and not theirs:
        raise ErasecError("there are no safetensors weights to compare", why=f"in {a} and in {b}")
    found = [Difference("only in A", key) for key in ours.keys() - theirs.keys()]
    found += [Difference("only in B", key) for key in theirs.keys() - ours.keys()]
    both = sorted(ours.keys() & theirs.keys())
    with bar("compare", len(both)) as advance:
        for key in both:
            if (difference := _compared(key, ours[key], theirs[key])) is not None:
                found.append(difference)
            advance()
    return sorted(found, key=lambda item: item.key) + (_files(a, b) if a.is_dir() else [])


def _visible(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path for name, path in sorted(paths.items()) if not any(p.startswith(".") for p in name.parts)
    }


def _tensors(root: Path) -> dict[str, Entry]:
    """Entries by "folder/key", or by "folder/file/key" for files that are not a component's main weights."""
    if root.is_file():
        return read_header(root)[0]
    found = {}
    for name, path in _visible(root).items():
        if path.suffix == ".safetensors":
            stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
            folder = Path(name).parent if stem in WEIGHTS else Path(name).parent / stem
            found.update({(folder / key).as_posix(): entry for key, entry in read_header(path)[0].items()})
    return found


def _files(a: Path, b: Path) -> list[Difference]:
    ours, theirs = (
        {name: path for name, path in _visible(root).items() if path.suffix != ".safetensors"} for root in (a, b)
    )
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            found.append(Difference("file", name, "only in A"))
        elif name not in ours:
            found.append(Difference("file", name, "only in B"))
        elif not filecmp.cmp(ours[name], theirs[name], shallow=False):
            found.append(Difference("file", name, "content differs"))
    return found


def _compared(key: str, a: Entry, b: Entry) -> Difference | None:
    if a.shape != b.shape:
        return Difference("shape", key, f"{list(a.shape)} -> {list(b.shape)}")
    if a.dtype != b.dtype:
        return _numbers("dtype", key, a, b, f"{DTYPES[a.dtype]} -> {DTYPES[b.dtype]}")
    if all(ours == theirs for ours, theirs in zip(_chunks(a), _chunks(b), strict=True)):
        return None
    return _numbers("moved", key, a, b, f"{DTYPES[a.dtype]} {list(a.shape)}")


def _chunks(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        for left in range(entry.stop - entry.start, 0, -CHUNK):
            yield stream.read(min(left, CHUNK))


def _numbers(kind: str, key: str, a: Entry, b: Entry, note: str) -> Difference:
    ours, theirs = read_tensor(a), read_tensor(b)
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return Difference(kind, key, f"{note}, not finite")
    change = theirs.double() - ours.double()
    size, base = float(change.norm()), float(ours.double().norm())
    relative = size / base if base else (math.inf if size else 0.0)
    largest = float(change.abs().max()) if change.numel() else 0.0
    return Difference(kind, key, note, relative, largest, rank(ours, theirs) if ours.dim() > 1 else None)


def rank(a: Tensor, b: Tensor) -> int:
    """The numerical rank of B - A for matrices as stored (more dimensions are flattened to (d_out, rest)).

    A merge rounds each number to the stored dtype, and that rounding is a full-rank matrix: a rank-2 edit of a float16
    weight differs from its base in every direction. So only singular values above the noise count. The noise of one
    element is uniform within its spacing in the dtype, s = spacing / sqrt(12), and the spectral norm of independent
    noise is at most about max_i |s_i| + max_j |s_j| over rows and columns (Bandeira and van Handel, 2016). Both A and
    B are taken to be rounded. An edit weaker than that noise cannot be told from it and counts as rank 0.
    """
    import torch

    ours, theirs = a.reshape(len(a), -1), b.reshape(len(b), -1)
    noise = _spacing(ours).square().add(_spacing(theirs).square()).div(12)
    floor = float(noise.sum(0).max().sqrt() + noise.sum(1).max().sqrt()) if noise.numel() else 0.0
    values = torch.linalg.svdvals(theirs.double() - ours.double())
    return int((values > floor).sum())


def _spacing(values: Tensor) -> Tensor:
    """The distance of each number to the next in its dtype, in float64; zero for integers, which are exact."""
    import torch

    if not values.is_floating_point():
        return torch.zeros(values.shape, dtype=torch.float64)
    limits = torch.finfo(values.dtype)
    smallest = limits.smallest_normal  # numbers below it, zero included, are as far apart as those above it
    exponent = torch.frexp(values.double().abs().clamp_min(smallest)).exponent - 1
    return torch.ldexp(torch.full(values.shape, limits.eps, dtype=torch.float64), exponent)
