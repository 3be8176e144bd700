"""Templates: a stored graph is read as it was written."""

from __future__ import annotations

import json

import pytest

from erasec.graphs.cache import cached_graph
from erasec.graphs.graph import Template, Weight, weight_from_json

onnx = pytest.importorskip("onnx")
WEIGHT = Weight("a:transpose", "a", (2, 3), (1, 0), (3, 2), "float32")


def test_a_stored_graph_is_read_again() -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "stored graph", [], []))
    folder = cached_graph("key", lambda: (model, [WEIGHT]))
    assert folder.stat().st_mode & 0o777 == 0o755  # for all who share the cache
    template = Template(folder, "key")
    assert template.weights == (WEIGHT,)
    assert template.load() == model
    assert weight_from_json(json.loads((folder / "weights.json").read_text())[0]) == WEIGHT
