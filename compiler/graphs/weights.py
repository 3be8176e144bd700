"""The weights of an ONNX file, wherever they are kept: their bytes and digests, and that of the graph without them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import CHUNK

if TYPE_CHECKING:
    from onnx import TensorProto

WEIGHTS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data",
           "data_location")  # fmt: skip


def digests(graph: Path, apart: Collection[str] = ()) -> tuple[str, str]:
    """sha256 of an ONNX file without its weights, and of its weights but for those named in ``apart``.

    Weights count by name, dtype, shape and bytes, wherever they lie; they are read in chunks."""
    import onnx

    model, weights = onnx.load(graph, load_external_data=False), hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        weights.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
        for chunk in bytes_of(graph, tensor) if tensor.name not in apart else ():
            weights.update(chunk)
        for field in WEIGHTS:
            tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(), weights.hexdigest()


def each_digest(graph: Path) -> dict[str, str]:
    """sha256 of every weight of an ONNX file, by name."""
    import onnx

    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        digest = hashlib.sha256()
        for chunk in bytes_of(graph, tensor):
            digest.update(chunk)
        found[tensor.name] = digest.hexdigest()
    return found


def read(graph: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Weights of an ONNX file, in the order that they have there."""
    import onnx

    found = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.name in names:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            found[tensor.name] = np.frombuffer(b"".join(bytes_of(graph, tensor)), dtype).reshape(*tensor.dims)
    return found


def bytes_of(graph: Path, tensor: TensorProto) -> Iterator[bytes]:
    """The bytes of an ONNX initializer, wherever they are kept, in chunks."""
    from onnx import numpy_helper

    where = {item.key: item.value for item in tensor.external_data}
    if not where:
        yield tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        return
    file, start = graph.parent / where["location"], int(where.get("offset", 0))
    length = int(where.get("length", file.stat().st_size - start))
    with file.open("rb") as stream:
        stream.seek(start)
        for left in range(length, 0, -CHUNK):
            yield stream.read(min(left, CHUNK))
