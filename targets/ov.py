"""Target openvino: the linked graphs as OpenVINO IR, in the layout that OVStableDiffusionPipeline reads.

Weights keep their names on the way from the checkpoint through ONNX into IR, so each is compared there, bit by bit.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from erasec.base import Artifact, Check, Context, Target, require
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError, nearest
from erasec.graphs import link as linker
from erasec.graphs.graph import graphs
from erasec.graphs.parity import TOLERANCES, compared
from erasec.model import sidecar as extras
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.graphs.graph import Graph
    from erasec.graphs.parity import Run
    from erasec.model.view import Model

    Array = NDArray[Any]

FILE = "openvino_model.xml"
# A weight's, by how weights are stored; arithmetic is float32 in each. tests/benchmarks/int8_glyphs.py shows what the
# last does to pictures.
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
AS = {"fp32": "", "fp16": ", rounded", "int8": ", in 256 levels"}
# Without the hint, CPUs that know bfloat16 compute in it: off by 2e-2 on glyphs and 9e-2 in a random UNet of Stable
# Diffusion's size, whatever the weights.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class OpenVino(Target):
    """IR with dynamic batch and size, inputs and outputs in float32. ``weights`` is how weights are stored: "fp32",
    "fp16" for half the bytes, or "int8" for a quarter, with a scale and a zero for each output channel."""

    weights: str = "fp32"

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "OpenVINO IR, in the layout of OVStableDiffusionPipeline"
    holds: ClassVar[frozenset[str]] = extras.KINDS

    def __post_init__(self) -> None:
        if self.weights not in BYTES:
            raise ErasecError(
                f"openvino: weights cannot be stored as {self.weights!r}", why=nearest(self.weights, BYTES)
            )

    def check(self) -> None:
        require("the target openvino", ("onnx", "openvino"), "openvino")

    def size(self, model: Model) -> int:
        """The IR, and the float32 graphs that it is made from. Raises ErasecError where they do not cover the model."""
        graphs(model.source)
        return int(super().size(model) * (1 + BYTES[self.weights] / 4))

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, convert each, then check each: its ports, its weights, and what it computes against torch.

        Raises ErasecError for models that the graphs do not cover.
        """
        self.check()
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as scratch:
            linked = Folder(Path(scratch))
            every = linker.write(checkpoint, linked.root)
            for name in linked.files():
                if not name.name.startswith("model.") and name.name != linker.MANIFEST:
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (linked.root / name).replace(out / name)
            with bar("convert to IR", len(every)) as advance:
                for graph in every:
                    advance(0, graph.name)
                    convert(linked.root / graph.name / "model.onnx", out / graph.name / FILE, self.weights)
                    advance()
            stored = weights(checkpoint, linked.root, out, every, self.weights)
        checks = ports(out, every), *stored, *parity(checkpoint, out, every, self.weights, context.seed)
        return Artifact(self.name, out, checks)


def convert(source: Path, target: Path, weights: str = "fp32") -> None:
    """Write an ONNX file as IR, ``target`` and its .bin; the same file gives the same bytes."""
    import onnx
    import openvino

    model = openvino.Core().read_model(source)
    if weights == "fp16":
        halve(model, {tensor.name for tensor in onnx.load(source, load_external_data=False).graph.initializer})
    elif weights == "int8":
        compress(model)
    for number, node in enumerate(model.get_ordered_ops()):
        # What has no name in the ONNX file is numbered over the whole process.
        if re.fullmatch(rf"{node.get_type_name()}_\d+(_\d+)?", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}_")
    openvino.save_model(model, target, compress_to_fp16=False)


def halve(model: Any, names: Collection[str]) -> None:
    """Store the constants of these names in float16; runtimes widen them.

    The library's own way takes all constants, and so a timestep's frequencies: off by 2e-4 of themselves, they turn the
    angle of step 1000 by 0.2, and a UNet of Stable Diffusion's size is then off by 9e-3 and not by 1.3e-3.
    """
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_friendly_name() in names and node.get_element_type() == openvino.Type.f32:
            users = node.output(0).get_target_inputs()
            wide = ops.convert(ops.constant(_halved(node.data)), openvino.Type.f32)
            wide.set_friendly_name(node.get_friendly_name())
            for user in users:
                user.replace_source_output(wide.output(0))


def _halved(weight: Array) -> Array:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and parity then tells
        return weight.astype(np.float16)


def compress(model: Any) -> None:
    """Store what linear layers, convolutions and embeddings multiply with or look up as bytes; runtimes widen it."""
    import openvino
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        users = node.output(0).get_target_inputs()
        axis, *others = {_rows(user) for user in users}
        if axis is None or others or len(node.shape) < 2:
            continue
        levels, zero, scale = quantized(node.data, axis)
        wide = [ops.convert(ops.constant(value), openvino.Type.f32) for value in (levels, zero)]
        found = ops.multiply(ops.subtract(*wide), ops.constant(scale))
        found.set_friendly_name(node.get_friendly_name())
        for user in users:
            user.replace_source_output(found.output(0))


def _rows(user: Any) -> int | None:
    """The axis of output channels, or of rows that are looked up, where ``user`` reads a weight; None where not."""
    node, index = user.get_node(), user.get_index()
    if node.get_type_name() == "Convolution" and index == 1:
        return 0
    if node.get_type_name() == "Gather" and index == 0:
        return 0
    if node.get_type_name() == "MatMul" and index == 1 and len(user.get_partial_shape()) == 2:
        return 0 if node.get_attributes()["transpose_b"] else 1
    return None


def quantized(weight: Array, axis: int) -> tuple[Array, Array, Array]:
    """Levels (of the weight's shape, uint8), zeros (uint8) and scales (float32) along ``axis``, other axes being 1:
    weight = (levels - zeros) * scales to half a scale. Zero is a level, so that padding and pruned weights stay it."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    low = np.minimum(weight.min(others, keepdims=True), 0)
    high = np.maximum(weight.max(others, keepdims=True), 0)
    scale = np.where(high > low, (high - low) / np.float32(255), np.float32(1)).astype(np.float32)
    zero = np.rint(-low / scale)
    levels = np.clip(np.rint(weight / scale) + zero, 0, 255)
    return levels.astype(np.uint8), zero.astype(np.uint8), scale


def ports(out: Path, every: Sequence[Graph]) -> Check:
    """Count the inputs and outputs whose name, type or dynamic axes are not the graph's: float32, and int64 for ids."""
    import openvino

    core, wrong, total = openvino.Core(), [], 0
    for graph in every:
        model = core.read_model(out / graph.name / FILE)
        for wanted, found in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
            there = {port.get_any_name(): port for port in found}
            total += len(wanted)
            wrong += [f"{graph.name}/{name}" for name in wanted.keys() ^ there.keys()]
            wrong += [f"{graph.name}/{name}" for name in wanted.keys() & there.keys()
                      if not _is(there[name], name, wanted[name])]  # fmt: skip
    how = f"of {total} inputs and outputs; name, type and dynamic axes as the graph has them"
    if wrong:
        how += f"; the first that is not: {min(wrong)}"
    return Check("openvino/ports", float(len(wrong)), 0.0, not wrong, how)


def _is(port: Any, name: str, axes: Mapping[int, str]) -> bool:
    shape = port.get_partial_shape()
    dynamic = {axis for axis in range(shape.rank.get_length()) if shape[axis].is_dynamic}
    return port.get_element_type().get_type_name() == ("i64" if name == "input_ids" else "f32") and dynamic == {*axes}


def weights(checkpoint: Folder, linked: Path, out: Path, every: Sequence[Graph], kind: str) -> tuple[Check, ...]:
    """Count the weights in IR that are not, bit for bit, the checkpoint's as the graph in ``linked`` lays them out.

    Those that are stored in float16 or bytes are compared with the checkpoint's brought to that.
    """
    import onnx
    import openvino

    carried, told = extras.read(checkpoint.root), linker.read_manifest(linked)["graphs"]
    checks = []
    for graph in every:
        names = [
            tensor.name
            for tensor in onnx.load(linked / graph.name / "model.onnx", load_external_data=False).graph.initializer
        ]
        wanted = linker.stored_tensor(checkpoint, graph, told[graph.name], carried)
        found = _constants(openvino.Core().read_model(out / graph.name / FILE))
        wrong = [name for name in names if not _same(found.get(name), wanted(name), kind)]
        how = f"weights that are not the checkpoint's, bit for bit{AS[kind]}, of {len(names)}"
        if wrong:
            how += f"; the first is {wrong[0]}"
        checks.append(Check(f"weights/{graph.name}", float(len(wrong)), 0.0, not wrong and bool(names), how))
    return tuple(checks)


def _same(found: Array | tuple[Array, ...] | None, wanted: Array, kind: str) -> bool:
    if isinstance(found, tuple):
        axis = int(np.argmax(found[-1].shape))
        return all(map(np.array_equal, found, quantized(wanted, axis)))
    if kind == "fp16":
        wanted = _halved(wanted)
    return found is not None and found.dtype == wanted.dtype and np.array_equal(found, wanted)


def _constants(model: Any) -> dict[str, Array | tuple[Array, ...]]:
    """Constants by name; those that are stored in float16 or as levels by the name of the node that widens them."""
    found: dict[str, Array | tuple[Array, ...]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            user = next(iter(node.output(0).get_target_inputs())).get_node()
            narrow = node.get_element_type().get_type_name() == "f16" and user.get_type_name() == "Convert"
            found[(user if narrow else node).get_friendly_name()] = node.data
        elif node.get_type_name() == "Multiply" and (levels := _levels(node)):
            found[node.get_friendly_name()] = levels
    return found


def _levels(node: Any) -> tuple[Array, ...]:
    """Levels, zeros and scales of a product that ``compress`` made; nothing for another."""
    shifted, scale = (node.input_value(index).get_node() for index in (0, 1))
    if (shifted.get_type_name(), scale.get_type_name()) != ("Subtract", "Constant"):
        return ()
    wide = [shifted.input_value(index).get_node() for index in (0, 1)]
    narrow = [each.input_value(0).get_node() for each in wide if each.get_type_name() == "Convert"]
    if len(narrow) != 2 or any(each.get_element_type().get_type_name() != "u8" for each in narrow):
        return ()
    return tuple(each.data for each in (*narrow, scale))


def parity(
    checkpoint: Folder, out: Path, every: Sequence[Graph], kind: str = "fp32", seed: int = 0
) -> tuple[Check, ...]:  # fmt: skip
    """Run every graph as it lies on disk, in OpenVINO in float32, against torch, as the target onnx does it."""
    checks = []
    with bar("check openvino", len(every)) as advance:
        for graph in every:
            advance(0, graph.name)
            run = _runner(out / graph.name / FILE)
            checks.append(compared(checkpoint, graph, out, kind, seed, TOLERANCES[kind], run, "openvino"))
            advance()
    return tuple(checks)


def _runner(file: Path) -> Run:
    import openvino
    import torch

    # Compiled when it is first run, so that what cannot be compiled is told as what cannot be run.
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = cache(lambda: openvino.Core().compile_model(file, "CPU", EXACT | threads))

    def run(name: str, given: Mapping[str, Any]) -> Sequence[Any]:
        return list(compiled()({key: np.asarray(value) for key, value in given.items()}).values())

    return run
