"""Where the text's keys and values lie in a TensorRT-RTX engine, and what follows: comparing them, and replacing them.

The library fuses the matrices that read the text into one, row by row, where that pays, and multiplies each key by the
root of what its attention scales with. The format is nobody's promise, so nothing is assumed: a place is where a matrix
lies to the byte, and a map of places is used for an edit only after an engine that was patched with it was compared
with one that was built: for the same builder, graph, profile and other weights, and matrix by matrix.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import CHUNK, atomic, copy, file_digest
from erasec.graphs.graph import cache
from erasec.graphs.weights import digests, read
from erasec.tensorrt.engines import ENGINE, Builder, Profile, build, entry, version

TEXT = "encoder_hidden_states"
MAP = "places.json"
FORMAT = 1
KNOWN = "1.7."  # versions of TensorRT-RTX whose layout was looked at
# Names that the library makes up: of several equal tensors it keeps one, another one in every build.
NAME = re.compile(rb"__mye\d+[\w./:]*")
PRINTED = np.isin(np.arange(256), [9, 10, *range(32, 127)])
BLOCK = 1 << 23  # no text is longer
REACH = 1 << 26  # how far from one another the matrices lie at most

Array = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """A matrix in an engine: its rows begin at ``offset`` and then every ``stride`` bytes, times ``scale``."""

    offset: int
    stride: int
    scale: float


def projections(graph: Path) -> dict[str, Array]:
    """The matrices (width of the text, channels) that an ONNX graph multiplies the text with, by initializer."""
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    texts = {TEXT} | {node.output[0] for node in model.node if node.op_type == "Cast" and node.input[0] == TEXT}
    names = {node.input[1] for node in model.node if node.op_type == "MatMul" and node.input[0] in texts}
    return read(graph, names)


def locate(engine: Path, matrices: Mapping[str, Array]) -> dict[str, Place]:
    """The places of those matrices that lie in an engine just once and byte for byte, values as they are, keys scaled.

    Keys (to_k) are looked for beside the values (to_v) of the same attention.
    """
    places: dict[str, Place] = {}
    near = 0
    with _mapped(engine) as data:
        for name, matrix in matrices.items():
            if ".to_v." not in name:
                continue
            place = _found(data, matrix, near)
            if place is None:
                continue
            places[name] = place
            near = place.offset
            key = name.replace(".to_v.", ".to_k.")
            if key in matrices and (beside := _beside(data, matrices[key], place)) is not None:
                places[key] = beside
    return places


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _found(data: mmap.mmap, matrix: Array, near: int) -> Place | None:
    """Where the matrix lies: looked for around another one's place first, as the file may have gigabytes."""
    rows = [matrix[i].tobytes() for i in range(2)]
    start = data.find(rows[0], max(near - REACH, 0), near + REACH) if near else -1
    start = data.find(rows[0]) if start < 0 else start
    if start < 0 or data.find(rows[0], start + 1, start + REACH) >= 0:
        return None
    place = Place(start, data.find(rows[1], start + len(rows[0])) - start, 1.0)
    return place if holds(data, place, matrix) else None


def _beside(data: mmap.mmap, matrix: Array, value: Place) -> Place | None:
    """Where a key lies, and what it is multiplied with: beside its value in each row, or, where the library has not
    fused the two, behind or before it as a whole."""
    width = matrix.shape[1] * matrix.itemsize
    for step in (width, -width, value.stride * len(matrix), -value.stride * len(matrix)):
        offset = value.offset + step
        plain = Place(offset, value.stride, 1.0)
        stored = _rows(data, plain, matrix)
        if stored is None:
            continue
        wide = matrix.astype(np.float64)
        with np.errstate(all="ignore"):
            ratio = float((stored.astype(np.float64) * wide).sum() / (wide**2).sum())
            # The key's half of the attention's scale: the fourth root of the width of a head, which is a whole number.
            head = round(ratio**-4) if 0 < ratio < 2 else 0
        if head:
            place = Place(offset, value.stride, float(matrix.dtype.type(head**-0.25)))
            if holds(data, place, matrix):
                return place
    return None


def _rows(data: Any, place: Place, matrix: Array) -> Array | None:
    """The matrix that is stored at a place, without a copy; None where the file has no room for it there."""
    height, width = matrix.shape
    if place.stride < width * matrix.itemsize or place.offset < 0:
        return None
    if place.offset + (height - 1) * place.stride + width * matrix.itemsize > len(data):
        return None
    strides = place.stride, matrix.itemsize
    return np.ndarray((height, width), matrix.dtype, data, place.offset, strides)


def holds(data: Any, place: Place, matrix: Array) -> bool:
    """Whether a file's bytes have the matrix at a place, byte for byte."""
    stored = _rows(data, place, matrix)
    if stored is None:
        return False
    return _scaled(matrix, place).tobytes() == stored.tobytes()


def _scaled(matrix: Array, place: Place) -> Array:
    scaled: Array = matrix * matrix.dtype.type(place.scale)
    return scaled


def patch(engine: Path, out: Path, places: Mapping[str, Place], matrices: Mapping[str, Array]) -> None:
    """Write ``engine`` to ``out`` with other matrices in their places, whole or not at all."""
    with atomic(out) as temporary:
        copy(engine, temporary)
        data = np.memmap(temporary, np.uint8, "r+")
        for name, matrix in matrices.items():
            stored = _rows(data, places[name], matrix)
            assert stored is not None  # the place was found in this file
            stored[...] = _scaled(matrix, places[name])
        data.flush()


def doubt(patched: Path, built: Path) -> str:
    """What makes two engines different programs, in words; empty where only names that the library made up differ."""
    if patched.stat().st_size != built.stat().st_size:
        return "they are not of one size"
    with _mapped(patched) as first, _mapped(built) as second:
        done = 0
        for start in range(0, len(first), CHUNK):
            one, other = (np.frombuffer(data[start : start + CHUNK], np.uint8) for data in (first, second))
            for at in (np.flatnonzero(one != other) + start).tolist():
                if at < done:
                    continue
                (begin, text), (other_begin, other_text) = (_text(data, at) for data in (first, second))
                placed = (begin, len(text)) == (other_begin, len(other_text))
                if not text or not placed or NAME.sub(b"", text) != NAME.sub(b"", other_text):
                    return f"byte {at} differs, and is in no name that the library made up"
                done = begin + len(text)
    return ""


def _text(data: mmap.mmap, at: int) -> tuple[int, bytes]:
    """Where the printed text around a byte begins, and that text; empty where the byte is none."""
    low = max(at - BLOCK, 0)
    around = data[low : at + BLOCK]
    ends = np.flatnonzero(~PRINTED[np.frombuffer(around, np.uint8)])
    after = int(np.searchsorted(ends, at - low))
    start = int(ends[after - 1]) + 1 if after else 0
    stop = int(ends[after]) if after < len(ends) else len(around)
    return low + start, around[start:stop]


def engine(graph: Path, file: Path, profile: Profile, builder: Builder) -> tuple[dict[str, Any], str]:
    """``engines.build``, or faster: an engine that was built before, with this graph's matrices in their places.

    That is done where the cache has an engine of the same library, settings, profile and graph whose other weights are
    the same, its file is the one that was kept, and the places of all matrices that differ are proven. Every engine
    that is built instead takes its place there, and proves the places where it is the same as the one before, patched.
    """
    start = time.monotonic()
    matrices, source = projections(graph), digests(graph)
    library = version(builder.library)
    key = _key(builder, library, profile, source[0], digests(graph, apart=matrices)[1])
    root = cache() / "engines" / key
    kept = _kept(root)
    changed = {name for name, matrix in matrices.items() if kept and kept["matrices"].get(name) != _sha256(matrix)}
    if kept and changed <= set(kept["proven"]):
        file.parent.mkdir(parents=True, exist_ok=True)
        patch(root / ENGINE, file, kept["places"], {name: matrices[name] for name in changed})
        return entry(file, source, profile, time.monotonic() - start) | {"patched": len(changed)}, library
    told, library = build(graph, file, profile, builder)
    places, proven = locate(file, matrices), set[str]()
    other = {name: matrices[name] for name in changed}
    if kept and changed <= places.keys() and not _doubted(root, file, places, other):
        proven = set(kept["proven"]) | changed
    _keep(root, file, matrices, places, proven)
    return told, library


def _doubted(root: Path, built: Path, places: Mapping[str, Place], matrices: Mapping[str, Array]) -> str:
    """``doubt`` of the engine that is kept, patched, and of one that was built instead, which has these places."""
    if (root / ENGINE).stat().st_size != built.stat().st_size:
        return "they are not of one size"
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=root) as scratch:
        trial = Path(scratch) / ENGINE
        patch(root / ENGINE, trial, places, matrices)
        return doubt(trial, built)


def _key(builder: Builder, library: str, profile: Profile, graph: str, weights: str) -> str:
    """The digest of all that an engine depends on, but for the matrices that read the text."""
    told = [FORMAT, asdict(builder), library, installed("polygraphy"), profile, graph, weights]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sha256(matrix: Array) -> str:
    return hashlib.sha256(matrix.tobytes()).hexdigest()


def _keep(
    root: Path, file: Path, matrices: Mapping[str, Array], places: Mapping[str, Place], proven: Collection[str]
) -> None:
    told = {
        "engine": file_digest(file), "matrices": {name: _sha256(matrix) for name, matrix in matrices.items()},
        "places": {name: asdict(place) for name, place in places.items()}, "proven": sorted(proven),
    }  # fmt: skip
    copy(file, root / ENGINE)
    with atomic(root / MAP) as temporary:
        temporary.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def _kept(root: Path) -> dict[str, Any]:
    """What is kept of an engine; nothing where it is not whole, or its file is another one than was kept."""
    try:
        told: dict[str, Any] = json.loads((root / MAP).read_text())
        told["places"] = {name: Place(**place) for name, place in told["places"].items()}
        whole = file_digest(root / ENGINE) == told["engine"] and set(told["proven"]) <= told["places"].keys()
        return told if whole and told["matrices"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
