"""Weightless graphs: what a component computes, traced once for a configuration, and where each of its weights lies.

A graph holds no weights; ``linker`` gives it some. It depends on the component's configuration, on precision and on the
exporter, and on no weights, no path and no name: that is what its key is made of, under which it is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.errors import ErasecError

if TYPE_CHECKING:
    from onnx import ModelProto

    from erasec.checkpoint.folder import Folder

FORMAT = 1  # of what is kept: a change of the code here that changes graphs raises it
PRECISIONS = ("fp32", "fp16")
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
COPIED = ("scheduler", "tokenizer", "feature_extractor")
LEFT_OUT = ("safety_checker", "image_encoder")  # the reader of this layout takes them from elsewhere, or does without
MORE_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds",
               "time_cond_proj_dim")  # fmt: skip
# What a configuration says beside how to compute.
IDLE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
MEMORY = "erasec_memory"  # the name of memories among the parameters: erasec_memory_NUMBER_keys, ..._values
EMBEDDING = "token_embedding.weight"

Axes = Mapping[int, str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One file model.onnx: its folder, the component whose weights it holds, and its inputs and outputs with the names
    of their dynamic axes. An output's axis may be computed, as in "height * 8": ONNX pipelines evaluate that."""

    name: str
    component: str
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


@dataclass(frozen=True)
class Weight:
    """One initializer of a graph: the parameter ``key`` of the component, of ``source`` shape there, with its axes in
    the order ``axes``, then of the initializer's ``shape``; ``dtype`` is "float32" or "float16"."""

    name: str
    key: str
    source: Shape
    axes: tuple[int, ...]
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Template:
    """A graph without weights in the folder ``root``: model.onnx, whose initializers say only their name, type and
    shape, and weights.json, the ``weights`` in their order. ``key`` is the digest of all that it depends on."""

    root: Path
    key: str

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(map(weight_from, json.loads((self.root / "weights.json").read_text())))

    def load(self) -> ModelProto:
        import onnx

        return onnx.load(self.root / "model.onnx", load_external_data=False)


def weight_from(told: Mapping[str, Any]) -> Weight:
    """A weight as JSON tells it."""
    shapes: dict[str, Shape] = {name: tuple(told[name]) for name in ("source", "axes", "shape")}
    return Weight(told["name"], told["key"], shapes["source"], shapes["axes"], shapes["shape"], told["dtype"])


def graphs(checkpoint: Folder) -> tuple[Graph, ...]:
    """The graphs of a checkpoint. Raises ErasecError where it has components or inputs that they do not cover."""
    listed = {name: kind for name, kind in checkpoint.index.items() if isinstance(kind, list) and kind[-1] is not None}
    for name, known in CLASSES.items():
        if name not in listed or listed[name][-1] != known:
            found = f"is a {listed[name][-1]}" if name in listed else "is missing"
            raise ErasecError(
                f"onnx: {name} {found}", why=f"its graph is written for {known}", where="model_index.json"
            )
    if extra := sorted(set(listed) - set(CLASSES) - set(COPIED) - set(LEFT_OUT)):
        raise ErasecError(
            f"onnx: the model has a {extra[0]}", why="only Stable Diffusion 1 and 2 layouts are written as ONNX",
            where="model_index.json", fix="build it for hf: --target hf",
        )  # fmt: skip
    unet = checkpoint.config("unet")
    if more := [key for key in MORE_INPUTS if unet.get(key) is not None]:
        raise ErasecError(
            f"onnx: the unet has {more[0]} = {unet[more[0]]!r}",
            why="it asks for more inputs than sample, timestep and encoder_hidden_states", where="unet/config.json",
        )  # fmt: skip
    batch, tokens = {0: "batch"}, {0: "batch", 1: "sequence"}
    size = {0: "batch", 2: "height", 3: "width"}
    scale = halvings(checkpoint.config("vae"))
    larger = {0: "batch", 2: f"height * {scale}", 3: f"width * {scale}"}
    smaller = {0: "batch", 2: f"height // {scale}", 3: f"width // {scale}"}
    return (
        Graph("text_encoder", "text_encoder", {"input_ids": tokens},
              {"last_hidden_state": tokens, "pooler_output": batch}),
        Graph("unet", "unet", {"sample": size, "timestep": {}, "encoder_hidden_states": tokens}, {"out_sample": size}),
        Graph("vae_decoder", "vae", {"latent_sample": size}, {"sample": larger}),
        Graph("vae_encoder", "vae", {"sample": size}, {"latent_parameters": smaller}),
    )  # fmt: skip


def with_whole_prompts(graph: Graph) -> Graph:
    """A text encoder whose prompts are of the model's full length: to know an empty one, it must see its end."""

    def fixed(ports: Mapping[str, Axes]) -> dict[str, Axes]:
        return {name: {axis: word for axis, word in axes.items() if axis != 1} for name, axes in ports.items()}

    return replace(graph, inputs=fixed(graph.inputs), outputs=fixed(graph.outputs))


def halvings(config: Mapping[str, Any]) -> int:
    """How much smaller the lowest level of a UNet or VAE is than its first."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def cache() -> Path:
    """Where graphs are kept: $ERASEC_CACHE, or erasec in $XDG_CACHE_HOME, or ~/.cache/erasec."""
    own, shared = os.environ.get("ERASEC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "erasec"


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a component's configuration says how it computes."""
    return {key: value for key, value in config.items() if key not in IDLE and not key.startswith("_")}


def whole(root: Path) -> bool:
    """Whether a kept graph is what was kept: a cache is anybody's, and half a graph would be taken for a whole one."""
    try:
        digest = (root / "digest").read_text()
        return digest == _digest((root / "model.onnx").read_bytes(), (root / "weights.json").read_bytes())
    except OSError:
        return False


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def keep(root: Path, model: ModelProto, weights: Sequence[Weight]) -> None:
    """Write a graph to the cache, whole or not at all; of two at once the first stays."""
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".graph-", dir=root.parent))
    scratch.chmod(0o755)  # who shares the cache reads it
    try:
        contents = model.SerializeToString(deterministic=True), json.dumps([asdict(each) for each in weights]).encode()
        (scratch / "model.onnx").write_bytes(contents[0])
        (scratch / "weights.json").write_bytes(contents[1])
        (scratch / "digest").write_text(_digest(*contents))
        if not whole(root):
            shutil.rmtree(root, ignore_errors=True)
            os.replace(scratch, root)
    except OSError:
        if not whole(root):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
