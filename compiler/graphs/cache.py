"""The weightless graphs in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint import store
from erasec.checkpoint.disk import named_errors
from erasec.checkpoint.owned import process_scratch
from erasec.graphs.graph import MODEL, WEIGHTS, Weight

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPHS_BYTES = 20_000_000  # the graphs of one model, without weights: an upper estimate
# Keys of a component's config that do not change what it computes.
DESCRIPTIVE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def computing_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a component's config that determines what it computes."""
    return {key: value for key, value in config.items() if key not in DESCRIPTIVE and not key.startswith("_")}


def cached_graph(key: str, make: Callable[[], tuple[ModelProto, Sequence[Weight]]]) -> Path:
    """The folder of the graph ``key``: in the store, or made now and stored there.

    Where the store can be neither read nor written, a note says so once, and the graph is kept until the process ends.
    """
    with store.unusable_is_noted():
        if stored := store.read_folder("graphs", key):
            return stored
    own = process_scratch() / "graphs" / key
    if store.is_whole(own):
        return own
    with named_errors(own):
        model, weights = make()

    def fill(folder: Path) -> None:
        (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        (folder / WEIGHTS).write_text(json.dumps([asdict(weight) for weight in weights]), encoding="utf-8")

    with store.unusable_is_noted():
        return store.write_folder("graphs", key, fill)
    with named_errors(own):
        own.mkdir(parents=True, exist_ok=True)
        fill(own)
        store.seal(own)
    return own
