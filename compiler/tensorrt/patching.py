"""Finds the matrices that project the text to keys and values in a TensorRT-RTX engine, compares and replaces them.

The library fuses these matrices row by row where that is faster, and multiplies each key matrix by the square root of
the attention's scale. Nobody guarantees this format, so nothing is assumed. A place is accepted only where a matrix
lies byte for byte. Places are used for an edit only after an engine that was patched at them equalled an engine that
was built, for the same builder, graph, profile and other weights, and then only for the matrices that differed between
the two.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from erasec.checkpoint import store
from erasec.checkpoint.owned import scratch_folder
from erasec.checkpoint.safetensors import CHUNK, atomic_write, copy_file
from erasec.documents import read_json
from erasec.graphs.signature import TEXT_STATES
from erasec.graphs.weights import digests, read_weights
from erasec.tensorrt.engines import ENGINE, Builder, Profile, build_engine, engine_entry, version

MAP = "places.json"
FORMAT = 2  # of places.json; part of the key in the store
KNOWN = "1.7."  # the versions of TensorRT-RTX whose layout this module was written for
# Names that the library generates. Of several equal tensors it keeps one, and which one differs between builds.
NAME = re.compile(rb"__mye\d+[\w./:]*")
PRINTABLE = np.isin(np.arange(256), [9, 10, *range(32, 127)])
LONGEST_TEXT = 1 << 23  # bytes; no text in an engine is longer
REACH = 1 << 26  # bytes; matrices of one engine lie at most this far from one another

Array = NDArray[Any]


@dataclass(frozen=True)
class MatrixLocation:
    """Where an engine holds a matrix: its rows begin at ``offset`` and then every ``stride`` bytes.

    The engine holds the matrix multiplied by ``scale``.
    """

    offset: int
    stride: int
    scale: float


def text_projections(graph: Path) -> dict[str, Array]:
    """The matrices (width of the text, channels) by which an ONNX graph multiplies the text, by initializer."""
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    texts = {TEXT_STATES} | {
        node.output[0] for node in model.node if node.op_type == "Cast" and node.input[0] == TEXT_STATES
    }
    names = {node.input[1] for node in model.node if node.op_type == "MatMul" and node.input[0] in texts}
    return read_weights(graph, names)


def locate(file: Path, matrices: Mapping[str, Array]) -> dict[str, MatrixLocation]:
    """The places of the matrices that an engine holds exactly once and byte for byte; key matrices may be scaled.

    Key matrices (to_k) are searched next to the value matrix (to_v) of the same attention.
    """
    places: dict[str, MatrixLocation] = {}
    near = 0
    with _mapped(file) as data:
        for name, matrix in matrices.items():
            if ".to_v." not in name:
                continue
            value = _search(data, matrix, near)
            if value is None:
                continue
            places[name] = value
            near = value.offset
            key_name = name.replace(".to_v.", ".to_k.")
            if key_name in matrices and (key := _key_place(data, matrices[key_name], value)) is not None:
                places[key_name] = key
    return places


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _search(data: mmap.mmap, matrix: Array, near: int) -> MatrixLocation | None:
    """The place of a matrix, searched around the offset ``near`` first, as the file may have gigabytes."""
    rows = [matrix[i].tobytes() for i in range(2)]
    start = data.find(rows[0], max(near - REACH, 0), near + REACH) if near else -1
    start = data.find(rows[0]) if start < 0 else start
    if start < 0 or data.find(rows[0], start + 1, start + REACH) >= 0:
        return None
    place = MatrixLocation(start, data.find(rows[1], start + len(rows[0])) - start, 1.0)
    return place if holds_matrix(data, place, matrix) else None


def _key_place(data: mmap.mmap, matrix: Array, value: MatrixLocation) -> MatrixLocation | None:
    """The place and the scale of a key matrix, given the place of its value matrix.

    It lies beside the value matrix in each row, or, where the library has not fused the two, after or before it.
    """
    width = matrix.shape[1] * matrix.itemsize
    for step in (width, -width, value.stride * len(matrix), -value.stride * len(matrix)):
        offset = value.offset + step
        stored = _rows(data, MatrixLocation(offset, value.stride, 1.0), matrix)
        if stored is None:
            continue
        wide = matrix.astype(np.float64)
        with np.errstate(all="ignore"):
            ratio = float((stored.astype(np.float64) * wide).sum() / (wide**2).sum())
            # Keys and queries are each multiplied by (width of a head) ** -0.25, and that width is a whole number.
            head = round(ratio**-4) if 0 < ratio < 2 else 0
        if head:
            place = MatrixLocation(offset, value.stride, float(matrix.dtype.type(head**-0.25)))
            if holds_matrix(data, place, matrix):
                return place
    return None


def _rows(data: Any, place: MatrixLocation, matrix: Array) -> Array | None:
    """A view of the matrix that is stored at a place; None where it would not fit into the file there."""
    height, width = matrix.shape
    if place.stride < width * matrix.itemsize or place.offset < 0:
        return None
    if place.offset + (height - 1) * place.stride + width * matrix.itemsize > len(data):
        return None
    strides = place.stride, matrix.itemsize
    return np.ndarray((height, width), matrix.dtype, data, place.offset, strides)


def holds_matrix(data: Any, place: MatrixLocation, matrix: Array) -> bool:
    """Whether the bytes at a place are those of the matrix, multiplied by the place's scale."""
    stored = _rows(data, place, matrix)
    if stored is None:
        return False
    return _scaled(matrix, place).tobytes() == stored.tobytes()


def _scaled(matrix: Array, place: MatrixLocation) -> Array:
    scaled: Array = matrix * matrix.dtype.type(place.scale)
    return scaled


def patch(source: Path, out: Path, places: Mapping[str, MatrixLocation], matrices: Mapping[str, Array]) -> None:
    """Write ``source`` to ``out`` with ``matrices`` at their places, whole or not at all."""
    with atomic_write(out) as temporary:
        copy_file(source, temporary)
        data = np.memmap(temporary, np.uint8, "r+")
        for name, matrix in matrices.items():
            stored = _rows(data, places[name], matrix)
            assert stored is not None  # the place was located in this file
            stored[...] = _scaled(matrix, places[name])
        data.flush()


def first_difference(patched: Path, built: Path) -> str:
    """How two engines differ as programs; "" where they differ in names that the library generates, or not at all."""
    if patched.stat().st_size != built.stat().st_size:
        return "their sizes differ"
    with _mapped(patched) as first, _mapped(built) as second:
        compared = 0
        for start in range(0, len(first), CHUNK):
            chunks = [np.frombuffer(data[start : start + CHUNK], np.uint8) for data in (first, second)]
            for at in (np.flatnonzero(chunks[0] != chunks[1]) + start).tolist():
                if at < compared:
                    continue
                (begin, text), (other_begin, other_text) = (_text(data, at) for data in (first, second))
                aligned = (begin, len(text)) == (other_begin, len(other_text))
                if not text or not aligned or NAME.sub(b"", text) != NAME.sub(b"", other_text):
                    return f"byte {at} differs, and is not part of a name that the library generates"
                compared = begin + len(text)
    return ""


def _text(data: mmap.mmap, at: int) -> tuple[int, bytes]:
    """Offset and bytes of the printable text around the byte at ``at``; empty where that byte is not printable."""
    low = max(at - LONGEST_TEXT, 0)
    around = data[low : at + LONGEST_TEXT]
    ends = np.flatnonzero(~PRINTABLE[np.frombuffer(around, np.uint8)])
    after = int(np.searchsorted(ends, at - low))
    start = int(ends[after - 1]) + 1 if after else 0
    stop = int(ends[after]) if after < len(ends) else len(around)
    return low + start, around[start:stop]


def patched_engine(graph: Path, file: Path, profile: Profile, builder: Builder) -> tuple[dict[str, Any], str]:
    """As ``engines.build_engine``, or faster: a cached engine with this graph's matrices written at their places.

    An engine is patched where the cache has one of the same library, settings, profile, graph and other weights, its
    file is unchanged, and the places of all matrices that differ are proven. Every engine that is built instead
    replaces the cached one. Where it equals the cached engine, patched, it proves the places that were patched.
    """
    start = time.monotonic()
    matrices, source = text_projections(graph), digests(graph)
    library = version(builder.library)
    key = _cache_key(builder, library, profile, source[0], digests(graph, skip=matrices)[1])
    root = None
    with store.unusable_is_noted():
        root = store.read_folder("engines", key)
    cached = _read_record(root) if root else {}
    changed = {name for name, matrix in matrices.items() if cached and cached["matrices"].get(name) != _sha256(matrix)}
    if root and cached and changed <= set(cached["proven"]):
        file.parent.mkdir(parents=True, exist_ok=True)
        patch(root / ENGINE, file, cached["places"], {name: matrices[name] for name in changed})
        return engine_entry(file, source, profile, time.monotonic() - start) | {"patched": len(changed)}, library
    entry, library = build_engine(graph, file, profile, builder)
    places, proven = locate(file, matrices), set[str]()
    replacements = {name: matrices[name] for name in changed}
    with store.unusable_is_noted():
        if root and cached and changed <= places.keys() and not _patch_mismatch(root, file, places, replacements):
            proven = set(cached["proven"]) | changed
        _store_engine(key, file, matrices, places, proven)
    return entry, library


def _patch_mismatch(
    root: Path, built: Path, places: Mapping[str, MatrixLocation], matrices: Mapping[str, Array]
) -> str:
    """``first_difference`` of the cached engine, patched at ``places``, and the engine ``built`` instead."""
    if (root / ENGINE).stat().st_size != built.stat().st_size:
        return "their sizes differ"
    with scratch_folder(root.parent) as scratch:
        trial = scratch / ENGINE
        patch(root / ENGINE, trial, places, matrices)
        return first_difference(trial, built)


def _cache_key(builder: Builder, library: str, profile: Profile, graph: str, weights: str) -> str:
    """The digest of all that an engine depends on, except the matrices that project the text."""
    content = [FORMAT, asdict(builder), library, installed("polygraphy"), profile, graph, weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(matrix: Array) -> str:
    return hashlib.sha256(matrix.tobytes()).hexdigest()


def _store_engine(
    key: str, file: Path, matrices: Mapping[str, Array], places: Mapping[str, MatrixLocation], proven: Collection[str]
) -> None:
    """Put an engine into the store, with the digests of its matrices, their places and which of these are proven."""
    record = {
        "matrices": {name: _sha256(matrix) for name, matrix in matrices.items()},
        "places": {name: asdict(place) for name, place in places.items()},
        "proven": sorted(proven),
    }

    def fill(folder: Path) -> None:
        copy_file(file, folder / ENGINE)
        (folder / MAP).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    store.write_folder("engines", key, fill, replace=True)


class _Record(TypedDict):
    matrices: dict[str, str]
    places: dict[str, MatrixLocation]
    proven: list[str]


def _read_record(root: Path) -> dict[str, Any]:
    """The record of a stored engine; {} where it has no matrices."""
    record: dict[str, Any] = {**read_json(root / MAP, _Record)}
    return record if record["matrices"] else {}
