"""Weightless graphs: what a component computes, traced once for a configuration, and which weight each initializer is.

A graph file holds no weights; ``erasec.graphs.link`` adds a checkpoint's. A graph depends on the component's
configuration, the precision and the exporter, and on no weight, path or name. The digest of all that it depends on is
its key in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.documents import read_json

if TYPE_CHECKING:
    from onnx import ModelProto


FORMAT = 2  # of the cache: raise it with every change of this code that changes graphs
MODEL = "model.onnx"  # the file of a graph in its folder
WEIGHTS = "weights.json"  # the file of its weights' shapes and names
MEMORY = "erasec_memory"  # memories are parameters called erasec_memory_NUMBER_keys and erasec_memory_NUMBER_values
EMBEDDING = "token_embedding.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One initializer of a graph, and the parameter of the component that it holds.

    The parameter is called ``key`` and has the shape ``source``. Its axes are put into the order ``axes``, then it is
    reshaped to the initializer's ``shape``. ``dtype`` is "float32" or "float16".
    """

    name: str
    key: str
    source: Shape
    axes: tuple[int, ...]
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Template:
    """A graph without weights in the folder ``root``.

    The folder has model.onnx, whose initializers have a name, a type and a shape but no data, and weights.json, which
    holds ``weights`` in the order of the initializers. ``key`` is the digest of all that the graph depends on.
    """

    root: Path
    key: str

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(read_json(self.root / WEIGHTS, list[Weight]))

    def load(self) -> ModelProto:
        import onnx

        return onnx.load(self.root / MODEL, load_external_data=False)


def weight_from_json(fields: Mapping[str, Any]) -> Weight:
    """A weight from its fields as JSON holds them: lists become tuples."""
    shapes: dict[str, Shape] = {name: tuple(fields[name]) for name in ("source", "axes", "shape")}
    return Weight(fields["name"], fields["key"], shapes["source"], shapes["axes"], shapes["shape"], fields["dtype"])
