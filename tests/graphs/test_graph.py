"""Templates: a stored graph is read as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasec.graphs.cache import is_whole, store
from erasec.graphs.graph import Template, Weight, weight_from_json

onnx = pytest.importorskip("onnx")
WEIGHT = Weight("a:transpose", "a", (2, 3), (1, 0), (3, 2), "float32")


def test_a_stored_graph_is_read_again(tmp_path: Path) -> None:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], []))
    store(tmp_path / "graph", model, [WEIGHT])
    assert is_whole(tmp_path / "graph")
    assert (tmp_path / "graph").stat().st_mode & 0o777 == 0o755  # for all who share the cache
    template = Template(tmp_path / "graph", "key")
    assert template.weights == (WEIGHT,)
    assert template.load() == model
    assert weight_from_json(json.loads((tmp_path / "graph" / "weights.json").read_text())[0]) == WEIGHT
