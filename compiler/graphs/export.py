"""A component as its configuration says, traced to an ONNX graph; no weight is read.

The TorchScript exporter is used although torch calls it deprecated: asked for a graph without parameters it keeps their
names, so that which initializer is which tensor is known and not guessed from equal bytes; it takes seconds where the
dynamo exporter takes a minute, writes neither stack traces nor paths, and its axes keep their names. It folds constants
after it has renamed them, so folding is done here.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from erasec.errors import ErasecError
from erasec.graphs.graph import (
    CLASSES,
    FORMAT,
    MEMORY,
    Graph,
    Shape,
    Template,
    Weight,
    cache,
    computed,
    halvings,
    keep,
    whole,
)
from erasec.model.sidecar import Extras
from erasec.progress import hush

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from torch import Tensor, nn

    from erasec.checkpoint.folder import Folder

# Sizes are (batch, height, width), in the least steps that latents can take.
LATENTS = 4
TRACED = (2, 2, 3)  # few, as CPUs are slow in float16; batch and sizes that none of the cases of parity has


def template(
    checkpoint: Folder, graph: Graph, precision: str, opset: int, islands: Sequence[str] = (),
    extras: Extras | None = None, negative: Sequence[Sequence[int]] = (),
) -> Template:  # fmt: skip
    """The weightless graph of one component, from the cache or traced now; no weight is read.

    ``islands`` are patterns of module names that compute in float32 where ``precision`` is "fp16". ``extras`` may hold
    memories, whose shapes are part of the graph, and tokens, by whose number the embedding grows. ``negative`` are the
    ids (2, tokens) of an empty prompt and of what takes its place.
    """
    extras = extras or Extras()
    memories = extras.memories if graph.name == "unet" else ()
    tokens = len(extras.tokens) if graph.component == "text_encoder" else 0
    told = {
        "format": FORMAT, "graph": asdict(graph), "config": computed(checkpoint.config(graph.component)),
        "precision": precision, "islands": sorted(islands) if precision == "fp16" else [], "opset": opset,
        "exporter": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx")},
        "memories": [
            [each.attention, each.mode, len(each.keys), each.weight, each.until, each.guided] for each in memories
        ],
        "steps": checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000) if memories
        else 0,
        "tokens": tokens, "negative": [list(ids) for ids in negative],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    root = cache() / "graphs" / key
    if not whole(root):
        module = empty(checkpoint, graph, precision, islands, replace(extras, memories=memories), negative)
        keep(root, *traced(module, checkpoint, graph, opset))
    return Template(root, key)


def negative_ids(checkpoint: Folder, carried: Extras, out: Path | None = None) -> tuple[tuple[int, ...], ...]:
    """The ids of the empty prompt and of the negative one that takes its place; none where the checkpoint has none.

    The tokenizer knows the checkpoint's new tokens; it is written to ``out``, where that is given.
    """
    if not (carried.tokens or carried.negative):
        return ()
    from transformers import CLIPTokenizer

    config = checkpoint.config("text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint.root / "tokenizer")
    if carried.tokens:
        if len(tokenizer) != config["vocab_size"]:
            raise ErasecError(
                "onnx: the new tokens have no place", where=str(checkpoint.root / "tokenizer"),
                why=f"the tokenizer knows {len(tokenizer)} and the text encoder {config['vocab_size']}",
                fix="build it for bundle: --target bundle",
            )  # fmt: skip
        tokenizer.add_tokens(list(carried.tokens))
        if out is not None:
            tokenizer.save_pretrained(out / "tokenizer")
    if not carried.negative:
        return ()
    length = config["max_position_embeddings"]
    ids = tokenizer(["", carried.negative], padding="max_length", max_length=length, truncation=True).input_ids
    return tuple(tuple(row) for row in ids)


def empty(
    checkpoint: Folder, graph: Graph, precision: str, islands: Sequence[str], extras: Extras,
    negative: Sequence[Sequence[int]] = (),
) -> nn.Module:  # fmt: skip
    """The component as its configuration says, ``extras`` attached, its weights not read: memory that nobody touched.

    Its forward takes the graph's inputs, in float32, and gives the graph's outputs, in float32.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    hush()
    config = checkpoint.config(graph.component)
    kind: Any = getattr(transformers if graph.component == "text_encoder" else diffusers, CLASSES[graph.component])
    with init_empty_weights(include_buffers=False):
        if graph.component == "text_encoder":
            module = kind(transformers.CLIPTextConfig(**config))
        else:
            module = kind.from_config(config)
    half = precision == "fp16"
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(name, _blank(parameter.shape))
    if graph.component == "text_encoder" and extras.tokens:
        embedding = module.get_input_embeddings()
        rows, width = embedding.weight.shape
        embedding.weight = _blank((rows + len(extras.tokens), width))
    if extras.memories:
        from erasec.attention.processors import attach

        blanks = [replace(each, keys=_blank(each.keys.shape), values=_blank(each.values.shape))
                  for each in extras.memories]  # fmt: skip
        steps = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
        for number, memory in enumerate(blanks):
            module.register_parameter(f"{MEMORY}_{number}_keys", memory.keys)
            module.register_parameter(f"{MEMORY}_{number}_values", memory.values)
        attach(module, blanks, steps)
    module.eval()
    _mark(module)
    if half:
        _halve(module, islands)
    return shaped(module, graph, torch.float16 if half else torch.float32, negative)


def _blank(shape: Sequence[int]) -> Any:
    # Not zeros: those are written, and then they take room.
    return torch.nn.Parameter(torch.empty(tuple(shape)), requires_grad=False)


def _mark(module: nn.Module) -> None:
    """Give every parameter a first number of its own: the exporter takes equal ones for one and drops the others.

    All else stays memory that was never written and takes no room.
    """
    for number, parameter in enumerate(module.parameters(), 1):
        parameter.data.view(-1)[0] = number


def _halve(module: Any, islands: Sequence[str]) -> None:
    """Compute in float16, but for the modules that ``islands`` name: they take and give float16 and compute in float32.

    A pattern may name none, as it may be meant for another component.
    """
    names = [name for name, _ in module.named_modules() if name]
    # Marks are whole numbers of at most a few hundreds, which float16 holds exactly.
    whole = [name for name in names if any(fnmatch(name, pattern) for pattern in islands)]
    outer = [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]
    for parameter in module.parameters():  # in place, as memories are read by who knows the parameter itself
        parameter.data = parameter.data.half()
    for name in outer:
        island = module.get_submodule(name).float()

        def widen(_: Any, args: Any, kwargs: Any) -> Any:
            return _cast(args, torch.float16, torch.float32), _cast(kwargs, torch.float16, torch.float32)

        def narrow(_: Any, __: Any, output: Any) -> Any:
            return _cast(output, torch.float32, torch.float16)

        island.register_forward_pre_hook(widen, with_kwargs=True)
        island.register_forward_hook(narrow)


def _cast(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(each, old, new) for each in value)
    if isinstance(value, dict):
        return {key: _cast(each, old, new) for key, each in value.items()}
    return value


def shaped(module: Any, graph: Graph, dtype: Any, negative: Sequence[Sequence[int]] = ()) -> nn.Module:
    """``module`` of ``dtype``, its forward made to take the graph's inputs and give its outputs, both in float32."""
    forward = module.forward
    if graph.name == "text_encoder":
        rows = torch.tensor([list(ids) for ids in negative], dtype=torch.int64)

        def encode(ids: Tensor) -> Any:
            if negative:
                # In arithmetic: the exporter must see no branch.
                other = (ids != rows[:1]).sum(1, keepdim=True) > 0
                ids = torch.where(other, ids, rows[1:])
            return tuple(each.float() for each in forward(ids, return_dict=False)[:2])

        module.forward = encode
    elif graph.name == "unet":

        def denoise(sample: Tensor, step: Tensor, states: Tensor) -> Any:
            return forward(sample.to(dtype), step, states.to(dtype), return_dict=False)[0].float()

        module.forward = denoise
    elif graph.name == "vae_decoder":
        module.forward = lambda latents: module.decode(latents.to(dtype), return_dict=False)[0].float()
    else:
        module.forward = lambda images: module.encode(images.to(dtype)).latent_dist.parameters.float()
    made: nn.Module = module
    return made


def inputs(checkpoint: Folder, graph: Graph, size: tuple[int, int, int], step: int, draw: Any) -> dict[str, Tensor]:
    """Seeded inputs of one size, (batch, height, width) in the least steps that the graph's latents can take: 4 latents
    for glyphs, 8 (64 pixels) for Stable Diffusion. So a case is small whatever the model's own size."""
    batch, height, width = size
    text, unet, vae = (checkpoint.config(component) for component in CLASSES)
    if graph.name == "text_encoder":
        # Prompts that end at different places, padded with the end token as tokenizers do; the taller, the shorter.
        fixed = 1 not in graph.inputs["input_ids"]
        length, end = text["max_position_embeddings"] * 2 // (2 if fixed else height), text["vocab_size"] - 1
        ids = torch.randint(0, end, (batch, length), generator=draw)
        for row in range(batch):
            ids[row, length // (row + 2) :] = end
        return {"input_ids": ids}
    if graph.name == "vae_encoder":
        scale = LATENTS * halvings(vae)
        pixels = torch.rand(batch, vae["in_channels"], height * scale, width * scale, generator=draw)
        return {"sample": pixels * 2 - 1}
    if graph.name == "vae_decoder":
        shape = batch, vae["latent_channels"], height * LATENTS, width * LATENTS
        return {"latent_sample": torch.randn(shape, generator=draw)}
    scale = halvings(unet)
    states = batch, text["max_position_embeddings"], unet["cross_attention_dim"]
    return {
        "sample": torch.randn(batch, unet["in_channels"], height * scale, width * scale, generator=draw),
        "timestep": torch.tensor(float(step)),  # float, as some schedulers step between whole numbers
        "encoder_hidden_states": torch.randn(states, generator=draw),
    }


def traced(
    module: nn.Module, checkpoint: Folder, graph: Graph, opset: int
) -> tuple[ModelProto, tuple[Weight, ...]]:  # fmt: skip
    """The graph of a module, its parameters made initializers without data, and what each of these is."""
    import onnx

    given = inputs(checkpoint, graph, TRACED, 300, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's deprecation, and the branches that parity then tries
        file = Path(scratch) / "model.onnx"
        torch.onnx.export(
            module, tuple(given.values()), str(file), input_names=list(graph.inputs), output_names=list(graph.outputs),
            dynamic_axes={**graph.inputs, **graph.outputs}, opset_version=opset, dynamo=False, export_params=False,
            do_constant_folding=False,
        )  # fmt: skip
        model = onnx.load(file)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    return model, _initialize(model, graph, shapes)


def _initialize(model: ModelProto, graph: Graph, shapes: Mapping[str, Shape]) -> tuple[Weight, ...]:
    """Make initializers without data of a graph's parameter inputs; changes of their layout are folded into them.

    Raises ErasecError where a parameter is none of the module's.
    """
    from onnx import TensorProto

    body = model.graph
    found: dict[str, Weight] = {}
    for value in body.input:
        if value.name in graph.inputs:
            continue
        kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        dtype = {"FLOAT": "float32", "FLOAT16": "float16"}.get(kind)
        if value.name not in shapes or dtype is None:
            raise ErasecError(f"onnx: the exporter made an input {value.name} ({kind})", why="no parameter is that")
        shape = shapes[value.name]
        found[value.name] = Weight(value.name, value.name, shape, tuple(range(len(shape))), shape, dtype)
    kept = _folded(body, found)
    used = {name for node in kept for name in node.input}
    weights = tuple(weight for name, weight in found.items() if name in used)
    own = [value for value in body.input if value.name in graph.inputs]
    del body.input[:], body.node[:], body.initializer[:]
    body.input.extend(own)
    body.node.extend(kept)
    for weight in weights:
        kind = TensorProto.FLOAT if weight.dtype == "float32" else TensorProto.FLOAT16
        body.initializer.add(name=weight.name, dims=weight.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    return weights


def _folded(body: GraphProto, found: dict[str, Weight]) -> list[NodeProto]:
    """The nodes that are left when those that only lay a parameter out anew are taken as that parameter."""
    from onnx import numpy_helper

    constants = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in body.node if node.op_type == "Constant" and node.attribute[0].HasField("t")
    }  # fmt: skip
    kept, renamed = [], dict[str, str]()
    for node in body.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        weight = found.get(node.input[0]) if node.input else None
        if weight is None or (laid := _laid(node, weight, constants)) is None:
            kept.append(node)
            continue
        same = next((each for each in found.values() if replace(each, name=laid.name) == laid), None)
        renamed[node.output[0]] = (same or laid).name
        if same is None:
            found[laid.name] = laid
    read = {name for node in kept for name in node.input}
    return [node for node in kept if node.op_type != "Constant" or node.output[0] in read]


def _laid(node: NodeProto, weight: Weight, constants: Mapping[str, Any]) -> Weight | None:
    """``weight`` as a node lays it out, None where the node does anything else."""
    named = f"{weight.key}:{node.op_type.lower()}"
    if node.op_type == "Identity":
        return weight
    plain = weight.shape == tuple(weight.source[axis] for axis in weight.axes)
    if node.op_type == "Transpose" and plain:
        axes = tuple(node.attribute[0].ints)
        return replace(
            weight, name=named, axes=tuple(weight.axes[a] for a in axes), shape=tuple(weight.shape[a] for a in axes)
        )
    if node.op_type == "Unsqueeze" and node.input[1] in constants:
        shape = list(weight.shape)
        new = [int(axis) % (len(shape) + constants[node.input[1]].size) for axis in constants[node.input[1]].flat]
        for axis in sorted(new):
            shape.insert(axis, 1)
        return replace(weight, name=f"{named}{''.join(map(str, sorted(new)))}", shape=tuple(shape))
    return None
