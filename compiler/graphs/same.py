"""Whether graphs that somebody handed over are those that erasec links to a checkpoint: weights, nodes and files.

Nothing of them is run. What to compare follows from the checkpoint and the options of the target, never from what was
handed over.
"""

from __future__ import annotations

import filecmp
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import Check
from erasec.checkpoint.folder import Folder
from erasec.graphs.graph import MODEL
from erasec.graphs.link import BASE, EDITED
from erasec.graphs.manifest import MANIFEST, read_manifest
from erasec.graphs.weights import DATA_FIELDS, weight_chunks

if TYPE_CHECKING:
    from onnx import ModelProto

# A constant of a node with more numbers may be a weight. Those of exported graphs are small, such as the causal mask of
# CLIP, 77 x 77; the smallest matrix with which Stable Diffusion reads text is 320 x 768.
LARGEST_CONSTANT = 2**15


def compare_graph(name: str, linked: Path, stored: Path, must_be_equal: bool = False) -> tuple[Check, Check]:
    """A check of the weights of a ``stored`` ONNX file, and one of all else in it, against the ``linked`` file.

    Another version of torch may export the same network with other nodes. The second check then has no limit, as they
    were not compared; unless the two graphs ``must_be_equal``, or a node holds a constant as large as a weight.
    """
    import onnx

    models = [onnx.load(file, load_external_data=False) for file in (linked, stored)]
    weights = _weights_check(name, linked, stored, models[0], models[1])
    bare = [_without_data(model) for model in models]
    return weights, nodes_check(name, bare[0], bare[1], must_be_equal)


def _weights_check(name: str, linked: Path, stored: Path, linked_model: ModelProto, stored_model: ModelProto) -> Check:
    wanted = {tensor.name: tensor for tensor in linked_model.graph.initializer}
    given = {tensor.name: tensor for tensor in stored_model.graph.initializer}
    wrong = {key for key, count in Counter(t.name for t in stored_model.graph.initializer).items() if count > 1}
    wrong |= wanted.keys() ^ given.keys()
    for key in wanted.keys() & given.keys():
        one, other = wanted[key], given[key]
        same = (one.data_type, one.dims) == (other.data_type, other.dims)
        if not same or not _equal(weight_chunks(linked, one), weight_chunks(stored, other)):
            wrong.add(key)
    how = f"weights that are not the checkpoint's, bit for bit, or that only one has, of {len(wanted)}"
    return Check.count(f"weights/{name}", sorted(wrong), how)


def _equal(one: Iterator[bytes], other: Iterator[bytes]) -> bool:
    return all(a == b for a, b in itertools.zip_longest(one, other))


def _without_data(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        for field in DATA_FIELDS:
            tensor.ClearField(field)
    return model


def nodes_check(name: str, linked: ModelProto, stored: ModelProto, must_be_equal: bool) -> Check:
    """The check of two ONNX models without the data of their weights; see ``compare_graph``."""
    check = f"graph/{name}"
    if linked.SerializeToString(deterministic=True) == stored.SerializeToString(deterministic=True):
        return Check.count(check, (), "nodes that are not those that erasec exports for the checkpoint")
    if large := large_constants([*_constants(linked)], [*_constants(stored)]):
        return Check.count(check, large, f"constants in nodes of {name} that are as large as a weight")
    if must_be_equal:
        how = "graph with other nodes than erasec exports, though the libraries have the versions of this machine"
        return Check.count(check, [name], how)
    how = f"graph, {name}, has other nodes than the libraries that are installed here export, so they were not compared"
    return Check.at_most(check, 1.0, None, how)


def large_constants(wanted: Sequence[tuple[str, int]], given: Sequence[tuple[str, int]]) -> list[str]:
    """The names of those constants, as name and size, that are as large as a weight, and have a size that more of the
    constants in ``given`` have than of those in ``wanted``. Names differ between versions of libraries."""
    more = Counter(size for _, size in given) - Counter(size for _, size in wanted)
    return sorted(name for name, size in given if size > LARGEST_CONSTANT and size in more)


def _constants(model: ModelProto) -> Iterator[tuple[str, int]]:
    """The name of each constant outside of the weights, and how many numbers or bytes it holds."""
    yield from ((tensor.values.name, prod(tensor.values.dims)) for tensor in model.graph.sparse_initializer)
    yield from _node_constants(model.graph.node)
    for function in model.functions:
        yield from _node_constants(function.node)


def _node_constants(nodes: Any) -> Iterator[tuple[str, int]]:
    for node in nodes:
        name = node.name or node.op_type
        for item in node.attribute:
            tensors = [item.t, *item.tensors, *(part.values for part in (item.sparse_tensor, *item.sparse_tensors))]
            for graph in (item.g, *item.graphs):
                tensors += [*graph.initializer, *(part.values for part in graph.sparse_initializer)]
                yield from _node_constants(graph.node)
            yield from ((name, prod(tensor.dims)) for tensor in tensors)
            yield name, max(len(item.floats), len(item.ints), len(item.s), sum(map(len, item.strings)))


def compare_folder(target: str, checkpoint: Path, linked: Path, out: Path) -> tuple[Check, ...]:
    """Checks that the ONNX folder ``out`` holds what the folder ``linked`` of the same ``checkpoint`` holds."""
    wanted, given = (read_manifest(folder)["graphs"] for folder in (linked, out))
    others = {MANIFEST, *(f"{name}/{MODEL}" for name in wanted)}
    data = {f"{name}/{file}" for name in wanted for file in (BASE, EDITED)}
    checks = files_checks(target, checkpoint, linked, out, others, data)
    if wanted.keys() != given.keys():
        how = f"graphs that {MANIFEST} and the checkpoint do not both have"
        checks = *checks, Check.count(f"{target}/graphs", sorted(wanted.keys() ^ given.keys()), how)
    if not all(check.passed for check in checks):
        return checks
    graphs = (
        compare_graph(name, linked / name / MODEL, out / name / MODEL, record["graph"] == given[name]["graph"])
        for name, record in wanted.items()
    )
    return *checks, *itertools.chain(*graphs)


def files_checks(
    target: str,
    checkpoint: Path,
    linked: Path,
    out: Path,
    others: Collection[str],
    may: Collection[str] = (),
    where: str = "",
) -> tuple[Check, ...]:
    """Checks that ``out`` holds exactly the files of a target.

    These are the configurations and tokenizers of the ONNX folder ``linked``, in the folder ``where``, which ends with
    "/"; and ``others``, which are compared elsewhere. Of the files in ``may`` any may be there. Copies of files of the
    ``checkpoint`` must be the same. Another version of erasec may write other configurations: the check of those has no
    limit.
    """
    names = [name.as_posix() for name in Folder(linked).files() if not name.name.startswith("model.")]
    names = [name for name in names if name != MANIFEST]
    present = Check.files(f"{target}/files", out, {*others, *(where + name for name in names)}, may)
    if not present.passed:
        return (present,)
    copies = [name for name in names if (checkpoint / name).is_file() and _same(checkpoint / name, linked / name)]
    different = [name for name in names if not _same(linked / name, out / f"{where}{name}")]
    how = f"files that are not the checkpoint's, byte for byte, of {len(copies)}"
    checks = present, Check.count(f"{target}/copies", [name for name in different if name in copies], how)
    if rewritten := [name for name in different if name not in copies]:
        how = f"files that this version of erasec writes otherwise; the first is {rewritten[0]}"
        return *checks, Check.at_most(f"{target}/configs", float(len(rewritten)), None, how)
    return checks


def _same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)
