"""Target openvino: the linked graphs as OpenVINO IR, in the layout that the OpenVINO pipelines of optimum read.

A weight keeps its name from the checkpoint through ONNX into IR, so each is compared there, bit for bit.
"""

from __future__ import annotations

import filecmp
import math
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.owned import process_scratch
from erasec.errors import require_modules
from erasec.graphs import parity
from erasec.graphs.cache import GRAPHS_BYTES
from erasec.graphs.graph import MODEL
from erasec.graphs.link import tensor_reader, write_onnx
from erasec.graphs.manifest import MANIFEST, read_manifest
from erasec.graphs.same import files_checks, large_constants
from erasec.graphs.signature import graphs
from erasec.model.sidecar import KINDS, read_extras
from erasec.options import options
from erasec.progress import bar
from erasec.runtime import backends
from erasec.runtime.schedulers import sampling_notes

if TYPE_CHECKING:
    from erasec.graphs.signature import Graph
    from erasec.model.view import Model

    Array = NDArray[Any]
    Stored = Array | tuple[Array, ...]  # a constant, or the levels, zeros and scales of a quantized one

RUNTIME = backends.OpenVino
FILE = RUNTIME.file
WEIGHTS = Path(FILE).with_suffix(".bin").name
# Bytes of a weight and how checks describe it, by how weights are stored; all compute in float32. The effect of int8 on
# images is measured by tests/benchmarks/int8_glyphs.py.
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
STORED_AS = {"fp32": "", "fp16": ", rounded", "int8": ", in 256 levels"}


@options
class OpenVino(Target):
    """IR with dynamic batch and size; inputs and outputs are float32.

    ``weights`` is how weights are stored: "fp32", "fp16" in half the bytes, or "int8" in a quarter of them, with a
    scale and a zero for each output channel.
    """

    weights: Literal["fp32", "fp16", "int8"] = "fp32"

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO IR, in the layout of optimum's OpenVINO pipelines"
    extras: ClassVar[frozenset[str]] = KINDS

    def check(self) -> None:
        require_modules("the target openvino", ("onnx", "openvino"), "openvino")

    def size(self, model: Model) -> int:
        """The IR, and the float32 graphs that it is converted from.

        Raises ErasecError for a model that the graphs do not cover.
        """
        graphs(model.source)
        return int(super().size(model) * (1 + BYTES[self.weights] / 4))

    def cached(self, model: Model) -> int:
        return GRAPHS_BYTES

    def notes(self, model: Model) -> tuple[str, ...]:
        return sampling_notes(self.name, model.source)

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, convert each, and compare each with the graph, the checkpoint and torch.

        Raises ErasecError for a model that the graphs do not cover.
        """
        self.check()
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as scratch:
            linked = Folder(Path(scratch))
            exported = write_onnx(checkpoint, linked.root)
            for name in linked.files():
                if not name.name.startswith("model.") and name.name != MANIFEST:
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (linked.root / name).replace(out / name)
            with bar("convert to IR", len(exported)) as advance:
                for graph in exported:
                    advance(0, graph.name)
                    convert(linked.root / graph.name / MODEL, out / graph.name / FILE, self.weights)
                    advance()
            weights = compare_weights(checkpoint, linked.root, out, exported, self.weights)
        outputs = compare_outputs(checkpoint, out, exported, self.weights, context.seed)
        return Artifact(self.name, out, (compare_ports(out, exported), *weights, *outputs), self.weights)

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        """The graphs are linked and converted again, and all files are compared with them."""
        self.check()
        with tempfile.TemporaryDirectory(dir=process_scratch()) as scratch:
            linked = Path(scratch)
            exported = write_onnx(checkpoint, linked)
            names = {f"{graph.name}/{file}" for graph in exported for file in (FILE, WEIGHTS)}
            checks = files_checks(self.name, checkpoint.root, linked, out, names)
            if not all(check.passed for check in checks):
                return checks
            checks += compare_weights(checkpoint, linked, out, exported, self.weights)
            return *checks, *(compare_ir(linked, out, graph, self.weights) for graph in exported)


def convert(source: Path, target: Path, weights: str = "fp32") -> None:
    """Write an ONNX file as IR: ``target`` and the .bin beside it. The same file gives the same bytes."""
    import onnx
    import openvino

    model = openvino.Core().read_model(source)
    if weights == "fp16":
        halve(model, {tensor.name for tensor in onnx.load(source, load_external_data=False).graph.initializer})
    elif weights == "int8":
        compress(model)
    for number, node in enumerate(model.get_ordered_ops()):
        # The library numbers nodes without a name over the whole process; here they are numbered within the model.
        if re.fullmatch(rf"{node.get_type_name()}_\d+(_\d+)?", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}_")
    openvino.save_model(model, target, compress_to_fp16=False)


def halve(model: Any, names: Collection[str]) -> None:
    """Store the constants called ``names`` in float16; the runtime converts them to float32.

    The library's own compression also takes constants that are no weights, such as the frequencies of the timestep
    embedding. Their relative error of 2e-4 turns the angle of timestep 1000 by 0.2, and the output of a UNet of Stable
    Diffusion's size is then off by 9e-3 instead of 1.3e-3.
    """
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_friendly_name() in names and node.get_element_type() == openvino.Type.f32:
            users = node.output(0).get_target_inputs()
            wide = ops.convert(ops.constant(_to_float16(node.data)), openvino.Type.f32)
            wide.set_friendly_name(node.get_friendly_name())
            for user in users:
                user.replace_source_output(wide.output(0))


def _to_float16(weight: Array) -> Array:
    with np.errstate(over="ignore"):  # numbers beyond float16 become infinite, and parity then fails
        return weight.astype(np.float16)


def compress(model: Any) -> None:
    """Store weights of linear layers, convolutions and embeddings as bytes; the runtime converts them to float32."""
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        users = node.output(0).get_target_inputs()
        axis, *others = {_channel_axis(user) for user in users}
        if axis is None or others or len(node.shape) < 2:
            continue
        levels, zero, scale = quantized(node.data, axis)
        wide = [ops.convert(ops.constant(value), openvino.Type.f32) for value in (levels, zero)]
        product = ops.multiply(ops.subtract(*wide), ops.constant(scale))
        product.set_friendly_name(node.get_friendly_name())
        for user in users:
            user.replace_source_output(product.output(0))


def _channel_axis(user: Any) -> int | None:
    """The axis of output channels, or of an embedding's rows, where the input ``user`` reads a weight; else None."""
    node, index = user.get_node(), user.get_index()
    if node.get_type_name() == "Convolution" and index == 1:
        return 0
    if node.get_type_name() == "Gather" and index == 0:
        return 0
    if node.get_type_name() == "MatMul" and index == 1 and len(user.get_partial_shape()) == 2:
        return 0 if node.get_attributes()["transpose_b"] else 1
    return None


def quantized(weight: Array, axis: int) -> tuple[Array, Array, Array]:
    """Levels (uint8, of the weight's shape), zeros (uint8) and scales (float32); the last two have 1 on all other axes.

    (levels - zeros) * scales is the weight to half a scale. The number 0 is a level, so that padding and pruned weights
    stay exact.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis)
    low = np.minimum(weight.min(others, keepdims=True), 0)
    high = np.maximum(weight.max(others, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / np.float32(255), np.float32(1)).astype(np.float32)
    zero = np.rint(-low / scale)
    levels = np.clip(np.rint(weight / scale) + zero, 0, 255)
    return levels.astype(np.uint8), zero.astype(np.uint8), scale


def compare_ports(out: Path, exported: Sequence[Graph]) -> Check:
    """Count inputs and outputs whose name, type or dynamic axes are not the graph's: int64 for ids, else float32."""
    import openvino

    core, wrong, total = openvino.Core(), [], 0
    for graph in exported:
        model = core.read_model(out / graph.name / FILE)
        for expected, ports in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
            by_name = {port.get_any_name(): port for port in ports}
            total += len(expected)
            wrong += [f"{graph.name}/{name}" for name in expected.keys() ^ by_name.keys()]
            wrong += [
                f"{graph.name}/{name}"
                for name in expected.keys() & by_name.keys()
                if not _port_matches(by_name[name], name, expected[name])
            ]
    how = f"of {total} inputs and outputs, those whose name, type or dynamic axes are not the graph's"
    return Check.count("openvino/ports", sorted(wrong), how)


def _port_matches(port: Any, name: str, axes: Mapping[int, str]) -> bool:
    shape = port.get_partial_shape()
    dynamic = {axis for axis in range(shape.rank.get_length()) if shape[axis].is_dynamic}
    return port.get_element_type().get_type_name() == ("i64" if name == "input_ids" else "f32") and dynamic == {*axes}


def compare_weights(
    checkpoint: Folder, linked: Path, out: Path, exported: Sequence[Graph], kind: str
) -> tuple[Check, ...]:
    """Count the weights of the IR that are not, bit for bit, the checkpoint's as the graph in ``linked`` lays them out.

    Weights that are stored in float16 or as bytes are compared with the checkpoint's, converted in the same way.
    """
    import onnx
    import openvino

    extras, manifest = read_extras(checkpoint.root), read_manifest(linked)["graphs"]
    checks = []
    for graph in exported:
        initializers = onnx.load(linked / graph.name / MODEL, load_external_data=False).graph.initializer
        read = tensor_reader(checkpoint, graph, manifest[graph.name], extras)
        constants = _constants(openvino.Core().read_model(out / graph.name / FILE))
        wrong = [
            tensor.name for tensor in initializers if not _same(constants.get(tensor.name), read(tensor.name), kind)
        ]
        if not initializers:
            wrong = [f"{graph.name} (it has no initializers)"]
        how = f"weights that are not the checkpoint's, bit for bit{STORED_AS[kind]}, of {len(initializers)}"
        checks.append(Check.count(f"weights/{graph.name}", wrong, how))
    return tuple(checks)


def compare_ir(linked: Path, out: Path, graph: Graph, kind: str) -> Check:
    """A check of all that is no weight in the IR of a graph, for which the graph in ``linked`` is converted again.

    Another version of OpenVINO or torch may write other nodes. The check then has no limit, as they were not compared,
    unless a constant that is no weight of the graph is as large as one.
    """
    import openvino

    again, stored, name = linked / graph.name / "again" / FILE, out / graph.name / FILE, f"graph/{graph.name}"
    convert(linked / graph.name / MODEL, again, kind)
    if all(filecmp.cmp(again.with_name(file), stored.with_name(file), shallow=False) for file in (FILE, WEIGHTS)):
        return Check.count(name, (), "files that are not those that erasec converts from the checkpoint")
    core = openvino.Core()
    wanted, given = ([*_sizes(core.read_model(file))] for file in (again, stored))
    if large := large_constants(wanted, given):
        return Check.count(name, large, f"constants of {graph.name} that are as large as a weight, and are none")
    how = f"graph, {graph.name}, is not what the libraries that are installed here convert, so that it was not compared"
    return Check.at_most(name, 1.0, None, how)


def _sizes(model: Any) -> Iterator[tuple[str, int]]:
    """The name of each constant and how many numbers it holds."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            yield node.get_friendly_name(), math.prod(node.shape)


def _same(stored: Stored | None, expected: Array, kind: str) -> bool:
    if isinstance(stored, tuple):
        axis = int(np.argmax(stored[-1].shape))
        return all(map(np.array_equal, stored, quantized(expected, axis)))
    if kind == "fp16":
        expected = _to_float16(expected)
    return stored is not None and stored.dtype == expected.dtype and np.array_equal(stored, expected)


def _constants(model: Any) -> dict[str, Stored]:
    """Constants by name. Those in float16 or in levels have the name of the node that converts them to float32."""
    constants: dict[str, Stored] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            user = next(iter(node.output(0).get_target_inputs())).get_node()
            narrow = node.get_element_type().get_type_name() == "f16" and user.get_type_name() == "Convert"
            constants[(user if narrow else node).get_friendly_name()] = node.data
        elif node.get_type_name() == "Multiply" and (levels := _levels(node)):
            constants[node.get_friendly_name()] = levels
    return constants


def _levels(node: Any) -> tuple[Array, ...]:
    """Levels, zeros and scales of a product that ``compress`` wrote; () for any other."""
    shifted, scale = (node.input_value(index).get_node() for index in (0, 1))
    if (shifted.get_type_name(), scale.get_type_name()) != ("Subtract", "Constant"):
        return ()
    wide = [shifted.input_value(index).get_node() for index in (0, 1)]
    narrow = [convert.input_value(0).get_node() for convert in wide if convert.get_type_name() == "Convert"]
    if len(narrow) != 2 or any(constant.get_element_type().get_type_name() != "u8" for constant in narrow):
        return ()
    return tuple(constant.data for constant in (*narrow, scale))


def compare_outputs(
    checkpoint: Folder, out: Path, exported: Sequence[Graph], kind: str = "fp32", seed: int = 0
) -> tuple[Check, ...]:
    """Run every graph in OpenVINO in float32 and compare it with torch, as ``parity.compare_outputs`` does."""
    import torch

    return parity.compare_outputs(
        checkpoint,
        out,
        dict.fromkeys((graph.name for graph in exported), kind),
        seed=seed,
        load=lambda graph: RUNTIME.load(out / graph.name / FILE, torch.get_num_threads()),
        runtime=RUNTIME.name,
    )
