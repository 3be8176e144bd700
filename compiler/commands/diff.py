"""``erasec diff``: which tensors differ between two checkpoints, by how much, and the rank of the difference."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint import manifest
from erasec.checkpoint.folder import SHARD, WEIGHTS, Folder, only_variant
from erasec.checkpoint.safetensors import CHUNK, DTYPES, Entry, read_header, read_tensor, tensor_bytes
from erasec.errors import ErasecError
from erasec.ldm.single_file import SingleFile
from erasec.ldm.tensor_names import UNUSED_IN_FOLDERS, canonical
from erasec.model.loading import BUNDLED, bundled_folder
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One tensor or file that differs.

    ``kind`` is "moved" (other values), "dtype" (another dtype), "shape", "only in A", "only in B", or "file" for a file
    without weights. ``change`` is |B - A| / |A| in Frobenius norms, inf if A is zero; ``largest`` is the largest
    absolute change; ``rank`` is the rank of B - A above rounding noise, for matrices and for convolutions as
    (d_out, rest). These three are None where they do not apply.
    """

    kind: str
    key: str
    note: str = ""
    change: float | None = None
    largest: float | None = None
    rank: int | None = None


def locate(name: str) -> Path:
    """The path of a folder or file, or of a bundled model by its name. For the output of a build, its folder ``hf``."""
    path = Path(name).expanduser()
    if not path.exists():
        if name in BUNDLED:
            return bundled_folder(name)
        raise ErasecError(f"there is no folder or file {name}", fix=f"give a path, or one of {', '.join(BUNDLED)}")
    return path / "hf" if (path / "hf" / "model_index.json").is_file() else path


def compare(a: Path, b: Path) -> list[Difference]:
    """The differences of two folders, of two safetensors files, or of a diffusers folder and a single file, by key.

    Tensors are first compared as bytes. Those that differ are read one at a time and compared in float64. The shards of
    a checkpoint are compared as one. A folder and a file are compared by the tensors of the folder's components, under
    their names in diffusers, without constants that single files leave out. Raises ErasecError for a damaged file.
    """
    if a.is_dir() == b.is_dir():
        in_a, in_b = _tensors(a), _tensors(b)
    elif a.is_dir():
        in_a, in_b = _by_component(a, b)
    else:
        in_b, in_a = _by_component(b, a)
    if not in_a and not in_b:
        raise ErasecError("there are no safetensors weights to compare", why=f"neither {a} nor {b} has any")
    differences = [Difference("only in A", key) for key in in_a.keys() - in_b.keys()]
    differences += [Difference("only in B", key) for key in in_b.keys() - in_a.keys()]
    both = sorted(in_a.keys() & in_b.keys())
    with bar("compare", len(both)) as advance:
        for key in both:
            if (difference := _compare_tensor(key, in_a[key], in_b[key])) is not None:
                differences.append(difference)
            advance()
    files = _compare_files(a, b) if a.is_dir() and b.is_dir() else []
    return sorted(differences, key=lambda item: item.key) + files


def _visible_files(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    paths.pop(Path(manifest.FILE), None)
    return {
        name.as_posix(): path for name, path in sorted(paths.items()) if not any(p.startswith(".") for p in name.parts)
    }


def _tensors(root: Path) -> dict[str, Entry]:
    """Tensors by "folder/key", or by "folder/file/key" in files that are not the main weights of a component."""
    if root.is_file():
        return read_header(root)[0]
    tensors = {}
    for name, path in _visible_files(root).items():
        if path.suffix == ".safetensors":
            stem = SHARD.sub("", path.stem)
            folder = Path(name).parent if stem in WEIGHTS else Path(name).parent / stem
            tensors.update({(folder / key).as_posix(): entry for key, entry in read_header(path)[0].items()})
    return tensors


def _by_component(folder: Path, file: Path) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The tensors of a diffusers folder and of a single file, by "component/key" with the present names of diffusers.

    Constants that single files leave out are left out of both. Raises ErasecError where ``folder`` is no diffusers
    folder or lacks a component, and where ``file`` is no whole checkpoint.
    """
    if not (folder / "model_index.json").is_file():
        raise ErasecError(
            f"the folder {folder} cannot be compared with a file",
            why="it has no model_index.json, and a single file is compared with a diffusers folder",
            fix="give a diffusers folder, two folders, or two .safetensors files",
        )
    single = SingleFile(file)

    def tensors(source: Folder) -> dict[str, Entry]:
        return {
            f"{name}/{canonical(name, key)}": entry
            for name in single.components
            for key, entry in source.entries(name).items()
            if canonical(name, key) not in UNUSED_IN_FOLDERS
        }

    return tensors(Folder(folder, only_variant(folder))), tensors(single)


def _compare_files(a: Path, b: Path) -> list[Difference]:
    in_a, in_b = (
        {name: path for name, path in _visible_files(root).items() if path.suffix != ".safetensors"} for root in (a, b)
    )
    differences = []
    for name in sorted(in_a.keys() | in_b.keys()):
        if name not in in_b:
            differences.append(Difference("file", name, "only in A"))
        elif name not in in_a:
            differences.append(Difference("file", name, "only in B"))
        elif not filecmp.cmp(in_a[name], in_b[name], shallow=False):
            differences.append(Difference("file", name, "content differs"))
    return differences


def _compare_tensor(key: str, a: Entry, b: Entry) -> Difference | None:
    if a.shape != b.shape:
        return Difference("shape", key, f"{list(a.shape)} -> {list(b.shape)}")
    if a.dtype != b.dtype:
        return _measure("dtype", key, a, b, f"{DTYPES[a.dtype]} -> {DTYPES[b.dtype]}")
    if same_bytes(a, b):
        return None
    return _measure("moved", key, a, b, f"{DTYPES[a.dtype]} {list(a.shape)}")


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two stored tensors of one dtype and shape have the same bytes."""
    if (a.transposed, a.swapped) != (b.transposed, b.swapped):
        return tensor_bytes(read_tensor(a)) == tensor_bytes(read_tensor(b))
    return all(chunk_a == chunk_b for chunk_a, chunk_b in zip(_chunks(a), _chunks(b), strict=True))


def _chunks(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        for left in range(entry.stop - entry.start, 0, -CHUNK):
            yield stream.read(min(left, CHUNK))


def _measure(kind: str, key: str, a: Entry, b: Entry, note: str) -> Difference:
    tensor_a, tensor_b = read_tensor(a), read_tensor(b)
    if not (tensor_a.isfinite().all() and tensor_b.isfinite().all()):
        return Difference(kind, key, f"{note}, not finite")
    change = tensor_b.double() - tensor_a.double()
    size, base = float(change.norm()), float(tensor_a.double().norm())
    relative = size / base if base else (math.inf if size else 0.0)
    largest = float(change.abs().max()) if change.numel() else 0.0
    return Difference(kind, key, note, relative, largest, rank(tensor_a, tensor_b) if tensor_a.dim() > 1 else None)


def rank(a: Tensor, b: Tensor) -> int:
    """The numerical rank of B - A, for tensors in their stored dtypes; tensors are flattened to (d_out, rest).

    A merge rounds each number to the stored dtype, and the rounding errors form a matrix of full rank: a rank-2 edit of
    a float16 weight differs from its base in every direction. Therefore only singular values above the noise count. The
    error of one element is uniform within its spacing in the dtype, with standard deviation s = spacing / sqrt(12). The
    spectral norm of independent errors is at most about max_i |s_i| + max_j |s_j| over rows and columns (Bandeira and
    van Handel, 2016). Both A and B are assumed to be rounded. An edit below the noise counts as rank 0.
    """
    import torch

    rows_a, rows_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    noise = _spacing(rows_a).square().add(_spacing(rows_b).square()).div(12)
    floor = float(noise.sum(0).max().sqrt() + noise.sum(1).max().sqrt()) if noise.numel() else 0.0
    values = torch.linalg.svdvals(rows_b.double() - rows_a.double())
    return int((values > floor).sum())


def _spacing(values: Tensor) -> Tensor:
    """The distance of each number to the next one in its dtype, in float64. Zero for integers, which are exact."""
    import torch

    if not values.is_floating_point():
        return torch.zeros(values.shape, dtype=torch.float64)
    limits = torch.finfo(values.dtype)
    smallest = limits.smallest_normal  # subnormal numbers and zero have the spacing of the smallest normal number
    exponent = torch.frexp(values.double().abs().clamp_min(smallest)).exponent - 1
    return torch.ldexp(torch.full(values.shape, limits.eps, dtype=torch.float64), exponent)
