"""The weights of an ONNX file, inside it or in external data: their bytes, and digests of weights and graph."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.folder import inside
from erasec.checkpoint.safetensors import CHUNK
from erasec.errors import ErasecError, shown

if TYPE_CHECKING:
    from onnx import TensorProto

# The fields of an initializer that hold its data or their location.
DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "int64_data",
    "double_data",
    "uint64_data",
    "external_data",
    "data_location",
)


def digests(graph: Path, skip: Collection[str] = ()) -> tuple[str, str]:
    """sha256 of an ONNX file without its weights, and sha256 of its weights.

    The second one is over the name, dtype, shape and bytes of each weight, wherever the bytes are stored. Those named
    in ``skip`` enter without their bytes. Weights are read in chunks.
    """
    import onnx

    model, weights = onnx.load(graph, load_external_data=False), hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name):
        weights.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
        for chunk in weight_chunks(graph, tensor) if tensor.name not in skip else ():
            weights.update(chunk)
        for field in DATA_FIELDS:
            tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(), weights.hexdigest()


def weight_digests(graph: Path) -> dict[str, str]:
    """sha256 of every weight of an ONNX file, by name."""
    import onnx

    by_name = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        digest = hashlib.sha256()
        for chunk in weight_chunks(graph, tensor):
            digest.update(chunk)
        by_name[tensor.name] = digest.hexdigest()
    return by_name


def read_weights(graph: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The weights called ``names`` as arrays, in the order of the ONNX file; names that it lacks are skipped."""
    import onnx

    arrays = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if tensor.name in names:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            arrays[tensor.name] = np.frombuffer(b"".join(weight_chunks(graph, tensor)), dtype).reshape(*tensor.dims)
    return arrays


def weight_chunks(graph: Path, tensor: TensorProto) -> Iterator[bytes]:
    """The bytes of an ONNX initializer, in the file or in external data, in chunks. Raises ErasecError where they are
    not in a file of the graph's folder."""
    from onnx import numpy_helper

    if not tensor.external_data:
        yield tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        return
    file, start, length = external_data(graph.parent, tensor)
    with file.open("rb") as stream:
        stream.seek(start)
        for left in range(length, 0, -CHUNK):
            yield stream.read(min(left, CHUNK))


def external_data(folder: Path, tensor: TensorProto) -> tuple[Path, int, int]:
    """The file of an initializer's external data, which lies in the ``folder`` of its graph; and where they begin and
    how long they are, in bytes. Raises ErasecError where that is no part of a file in the folder."""
    location = {item.key: item.value for item in tensor.external_data}
    file = inside(folder, location.get("location", ""))
    size = file.stat().st_size if file.is_file() else -1
    try:
        start = int(location.get("offset", 0))
        length = int(location.get("length", size - start))
    except ValueError:
        start, length = -1, 0
    if start < 0 or length < 0 or start + length > size:
        raise ErasecError(
            f"the data of {shown(tensor.name)} are missing",
            why=f"its graph expects them where {file.name} has none",
            where=str(folder),
            fix="fetch the folder again, or build it again",
        )
    return file, start, length
