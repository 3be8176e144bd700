"""Traces a component, built from its config without reading a weight, to an ONNX graph.

The TorchScript exporter is used although torch deprecates it. It keeps the names of parameters when it exports a graph
without them, so every initializer is known by name and not guessed from equal bytes. It takes seconds where the dynamo
exporter takes a minute, it writes neither stack traces nor paths, and axes keep their names. It folds constants only
into graphs with parameters, so this module folds changes of layout itself.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from erasec.checkpoint.configs import described_by
from erasec.checkpoint.folder import downscale
from erasec.checkpoint.owned import process_scratch
from erasec.errors import ErasecError
from erasec.graphs.cache import cached_graph, computing_config
from erasec.graphs.conditioning import picture_inputs
from erasec.graphs.graph import FORMAT, MEMORY, MODEL, Shape, Template, Weight
from erasec.graphs.signature import (
    DENOISERS,
    HIDDEN,
    TEXT_STATES,
    Graph,
    configs,
    input_shapes,
    layout,
    num_train_timesteps,
)
from erasec.model.sidecar import Extras
from erasec.progress import disable_library_bars

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from torch import Tensor, nn

    from erasec.checkpoint.folder import Folder

# Sizes of sample inputs are (batch, height, width); height and width count the smallest step of latents.
LATENTS = 4  # that step for graphs other than the denoiser, whose step is its downscaling
GUIDANCE = 3.5  # of sample inputs
ADDED = {"text_embeds", "time_ids"}  # inputs that a UNet of diffusers takes in one dictionary
TRACED = (2, 2, 3)  # small, as CPUs are slow in float16; parity uses other batches and sizes


def graph_template(
    checkpoint: Folder,
    graph: Graph,
    precision: str,
    opset: int,
    keep_in_fp32: Sequence[str] = (),
    extras: Extras | None = None,
    negative: Sequence[Sequence[int]] = (),
) -> Template:
    """The weightless graph of one component, from the cache or traced now; no weight is read.

    ``keep_in_fp32`` are patterns of names of modules that compute in float32 where ``precision`` is "fp16".
    ``extras`` may hold memories, whose shapes are part of the graph, and tokens, whose number extends the embedding.
    ``negative`` are token ids (2, tokens): those of the empty prompt and those of the prompt that replaces it.
    """
    extras = extras or Extras()
    memories = extras.memories if graph.name in DENOISERS else ()
    tokens = len(extras.tokens) if graph.component == "text_encoder" else 0
    description = {
        "format": FORMAT,
        "graph": asdict(graph),
        "config": computing_config(checkpoint.config(graph.component)),
        "precision": precision,
        "islands": sorted(keep_in_fp32) if precision == "fp16" else [],
        "opset": opset,
        "exporter": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx")},
        "memories": [
            [memory.attention, memory.mode, len(memory.keys), memory.weight, memory.until, memory.guided]
            for memory in memories
        ],
        "steps": num_train_timesteps(checkpoint) if memories else 0,
        "tokens": tokens,
        "negative": [list(ids) for ids in negative],
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()

    def make() -> tuple[ModelProto, tuple[Weight, ...]]:
        module = weightless_module(
            checkpoint, graph, precision, keep_in_fp32, replace(extras, memories=memories), negative
        )
        return trace(module, checkpoint, graph, opset)

    return Template(cached_graph(key, make), key)


def negative_ids(checkpoint: Folder, extras: Extras, out: Path | None = None) -> tuple[tuple[int, ...], ...]:
    """Token ids (2, tokens) of the empty prompt and of the negative prompt that replaces it; () without a negative one.

    The tokenizer is extended by the new tokens of ``extras``, and saved to ``out``/tokenizer where ``out`` is given.
    Raises ErasecError where the tokenizer and the text encoder differ in their number of tokens.
    """
    if not (extras.tokens or extras.negative):
        return ()
    from erasec.model.text_encoders import load_tokenizer

    config = checkpoint.config("text_encoder")
    tokenizer = load_tokenizer(checkpoint)
    if extras.tokens:
        if len(tokenizer) != config["vocab_size"]:
            raise ErasecError(
                "onnx: the new tokens have no place in the tokenizer",
                where=str(checkpoint.root / "tokenizer"),
                why=f"the tokenizer knows {len(tokenizer)} tokens and the text encoder {config['vocab_size']}",
                fix="build it for bundle: --target bundle",
            )
        tokenizer.add_tokens(list(extras.tokens))
        if out is not None:
            tokenizer.save_pretrained(out / "tokenizer")
    if not extras.negative:
        return ()
    length = config["max_position_embeddings"]
    ids = tokenizer(["", extras.negative], padding="max_length", max_length=length, truncation=True).input_ids
    return tuple(tuple(row) for row in ids)


def weightless_module(
    checkpoint: Folder,
    graph: Graph,
    precision: str,
    keep_in_fp32: Sequence[str],
    extras: Extras,
    negative: Sequence[Sequence[int]] = (),
) -> nn.Module:
    """The component built from its config, with ``extras`` attached and uninitialised parameters.

    Its forward takes the graph's inputs and returns the graph's outputs, both in float32.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    disable_library_bars()
    config = dict(checkpoint.config(graph.component))
    cls: Any = getattr(transformers if graph.encodes_text else diffusers, graph.kind)
    with described_by(graph.component, checkpoint.root), init_empty_weights(include_buffers=False):
        module = cls(cls.config_class(**config)) if graph.encodes_text else cls.from_config(config)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(name, _uninitialised(parameter.shape))
    if graph.component == "text_encoder" and extras.tokens:
        embedding = module.get_input_embeddings()
        rows, width = embedding.weight.shape
        embedding.weight = _uninitialised((rows + len(extras.tokens), width))
    if extras.memories:
        from erasec.attention.processors import attach

        memories = [
            replace(memory, keys=_uninitialised(memory.keys.shape), values=_uninitialised(memory.values.shape))
            for memory in extras.memories
        ]
        for number, memory in enumerate(memories):
            module.register_parameter(f"{MEMORY}_{number}_keys", memory.keys)
            module.register_parameter(f"{MEMORY}_{number}_values", memory.values)
        attach(module, memories, num_train_timesteps(checkpoint))
    module.eval()
    for norm in module.modules():
        if isinstance(norm, torch.nn.RMSNorm):
            norm.forward = partial(_rms_norm, norm)  # type: ignore[method-assign]
    _mark(module)
    half = precision == "fp16"
    if half:
        _to_float16(module, keep_in_fp32)
    return with_graph_signature(module, graph, torch.float16 if half else torch.float32, negative)


def _rms_norm(norm: torch.nn.RMSNorm, value: Tensor) -> Tensor:
    """What torch.nn.RMSNorm computes, in operations that the exporter knows."""
    eps = torch.finfo(value.dtype).eps if norm.eps is None else norm.eps
    normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return normed if norm.weight is None else normed * norm.weight


def _uninitialised(shape: Sequence[int]) -> Any:
    # torch.zeros would write every page, and so occupy the memory of all weights.
    return torch.nn.Parameter(torch.empty(tuple(shape)), requires_grad=False)


def _mark(module: nn.Module) -> None:
    """Set the first number of every parameter to its position: the exporter merges equal parameters into one.

    Nothing else is written, so the rest of the parameters occupies no memory.
    """
    for number, parameter in enumerate(module.parameters(), 1):
        parameter.data.view(-1)[0] = number


def _to_float16(module: Any, keep_in_fp32: Sequence[str]) -> None:
    """Compute in float16, except in modules whose names match ``keep_in_fp32``, which compute in float32.

    A pattern may match no module here, as it may be meant for another component.
    """
    names = [name for name, _ in module.named_modules() if name]
    matching = [name for name in names if any(fnmatch(name, pattern) for pattern in keep_in_fp32)]
    outermost = [name for name in matching if not any(name.startswith(f"{parent}.") for parent in matching)]
    # Marks are whole numbers up to a few hundred, which float16 holds exactly. The conversion is in place, as the
    # processors of memories refer to the parameters themselves.
    for parameter in module.parameters():
        parameter.data = parameter.data.half()
    for name in outermost:
        wide_module = module.get_submodule(name).float()

        def widen(_: Any, args: Any, kwargs: Any) -> Any:
            return _cast(args, torch.float16, torch.float32), _cast(kwargs, torch.float16, torch.float32)

        def narrow(_: Any, __: Any, output: Any) -> Any:
            return _cast(output, torch.float32, torch.float16)

        wide_module.register_forward_pre_hook(widen, with_kwargs=True)
        if not name.endswith(".wo"):  # T5 adds this output to the sum of all layers, which may exceed float16
            wide_module.register_forward_hook(narrow)


def _cast(value: Any, old: Any, new: Any) -> Any:
    """``value`` with every tensor of the dtype ``old`` in it converted to ``new``."""
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, old, new) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, old, new) for key, item in value.items()}
    return value


def with_graph_signature(module: Any, graph: Graph, dtype: Any, negative: Sequence[Sequence[int]] = ()) -> nn.Module:
    """``module``, which computes in ``dtype``, with the forward of ``graph_function``."""
    module.forward = graph_function(module, graph, dtype, negative, module.forward)
    wrapped: nn.Module = module
    return wrapped


def graph_function(
    module: Any,
    graph: Graph,
    dtype: Any,
    negative: Sequence[Sequence[int]] = (),
    forward: Callable[..., Any] | None = None,
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A function that runs ``module``, which computes in ``dtype``, and takes and returns what the graph does, in
    float32.

    ``negative`` (2, tokens): prompts with the ids of the first row are encoded as those of the second. ``forward`` is
    called instead of the module, without its hooks.
    """
    stock, rows = forward or module, torch.tensor([list(ids) for ids in negative], dtype=torch.int64)

    def encode(ids: Tensor) -> Any:
        if negative:
            # Arithmetic instead of a branch: the exporter records one branch only.
            differs = (ids != rows[:1]).sum(1, keepdim=True) > 0
            ids = torch.where(differs, ids, rows[1:])
        wanted = any(name.startswith(HIDDEN) for name in graph.outputs)
        outputs = stock(ids, return_dict=True, **({"output_hidden_states": True} if wanted else {}))
        hidden = {f"{HIDDEN}{number}": states for number, states in enumerate(outputs.hidden_states or ())}
        return tuple((hidden[name] if name in hidden else outputs[name]).float() for name in graph.outputs)

    def denoise(*inputs: Tensor) -> Any:
        # Timesteps stay in float32, in which they are exact.
        given: dict[str, Any] = {
            name: value if name == "timestep" else value.to(dtype)
            for name, value in zip(graph.inputs, inputs, strict=True)
        }
        if given.keys() >= ADDED:
            given["added_cond_kwargs"] = {name: given.pop(name) for name in sorted(ADDED)}
        return stock(**given, return_dict=False)[0].float()

    def decode(latents: Tensor) -> Tensor:
        return module.decode(latents.to(dtype), return_dict=False)[0].float()  # type: ignore[no-any-return]

    if graph.encodes_text:
        return encode
    if graph.denoises:
        return denoise
    if graph.name == "vae_decoder":
        return decode
    return lambda images: module.encode(images.to(dtype)).latent_dist.parameters.float()


def sample_inputs(
    checkpoint: Folder, graph: Graph, size: tuple[int, int, int], step: int, rng: Any
) -> dict[str, Tensor]:
    """Random inputs of a graph for the ``size`` (batch, height, width) and the timestep ``step``, drawn from ``rng``.

    Height and width count the smallest step of the graph's latents: for the UNet of Stable Diffusion 8 latents (64
    pixels), for that of glyphs 4, for a transformer 2. So inputs are small whatever the size of the model's own images.
    """
    batch, height, width = size
    by_component = configs(checkpoint)
    unit = downscale(by_component[graph.component]) if graph.denoises else LATENTS
    latents = batch, height * unit, width * unit
    shapes = input_shapes(graph, by_component, *latents)
    if graph.encodes_text:
        # Prompts of different lengths, padded with the end token as tokenizers do; a larger height gives shorter ones.
        fixed = 1 not in graph.inputs["input_ids"]
        length = shapes["input_ids"][1] * 2 // (2 if fixed else height)
        end = by_component[graph.component]["vocab_size"] - 1
        ids = torch.randint(0, end, (batch, length), generator=rng)
        for row in range(batch):
            ids[row, length // (row + 2) :] = end
        return {"input_ids": ids}
    if graph.name == "vae_encoder":
        return {"sample": torch.rand(shapes["sample"], generator=rng) * 2 - 1}
    inputs = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items() if name != "timestep"}
    if graph.denoises:
        name = layout(checkpoint)
        described = picture_inputs(name, by_component, latents, inputs[TEXT_STATES].shape[1], GUIDANCE)
        inputs |= {key: torch.from_numpy(value) for key, value in described.items()}
        # The timestep is a float, as some schedulers use timesteps between whole numbers.
        inputs["timestep"] = torch.full(shapes["timestep"], step / 1000 if name == "flux" else float(step))
    return {key: inputs[key] for key in graph.inputs}


@contextmanager
def _traceable_rotation() -> Iterator[None]:
    """Lets FLUX rotate queries and keys by operations whose shapes stay dynamic: diffusers' own take a part of a shape,
    which the exporter records as the numbers of the sample input."""
    from diffusers.models.transformers import transformer_flux

    stock = transformer_flux.apply_rotary_emb

    def rotate(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int = 2) -> Tensor:
        cos, sin = (values.unsqueeze(1 if sequence_dim == 1 else 0)[None] for values in freqs_cis)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([-imaginary, real], -1).flatten(-2)
        return (x.float() * cos + rotated.float() * sin).to(x.dtype)

    transformer_flux.apply_rotary_emb = rotate
    try:
        yield
    finally:
        transformer_flux.apply_rotary_emb = stock


def trace(module: nn.Module, checkpoint: Folder, graph: Graph, opset: int) -> tuple[ModelProto, tuple[Weight, ...]]:
    """The graph of a module, with initializers without data in place of its parameters, and what each of them holds."""
    import onnx

    inputs = sample_inputs(checkpoint, graph, TRACED, 300, torch.Generator().manual_seed(0))
    with (
        tempfile.TemporaryDirectory(dir=process_scratch()) as scratch,
        warnings.catch_warnings(),
        torch.no_grad(),
        _traceable_rotation(),
    ):
        # The exporter warns of its deprecation, and of branches on sizes, which parity tests at other sizes.
        warnings.simplefilter("ignore")
        file = Path(scratch) / MODEL
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={**graph.inputs, **graph.outputs},
            opset_version=opset,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
        )
        model = onnx.load(file)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
    return model, _to_initializers(model, graph, shapes)


def _to_initializers(model: ModelProto, graph: Graph, shapes: Mapping[str, Shape]) -> tuple[Weight, ...]:
    """Replace a graph's parameter inputs by initializers without data; fold changes of their layout into them.

    ``shapes`` are those of the module's parameters. Raises ErasecError where an input is no parameter.
    """
    from onnx import TensorProto

    body = model.graph
    weights: dict[str, Weight] = {}
    for value in body.input:
        if value.name in graph.inputs:
            continue
        kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        dtype = {"FLOAT": "float32", "FLOAT16": "float16"}.get(kind)
        if value.name not in shapes or dtype is None:
            raise ErasecError(
                f"onnx: the exporter made an input {value.name} ({kind})",
                why="the module has no parameter of this name and type",
                fix="install the versions of torch and diffusers that erasec is tested with",
            )
        shape = shapes[value.name]
        weights[value.name] = Weight(value.name, value.name, shape, tuple(range(len(shape))), shape, dtype)
    nodes = _fold_layouts(body, weights)
    used = {name for node in nodes for name in node.input}
    initializers = tuple(weight for name, weight in weights.items() if name in used)
    inputs = [value for value in body.input if value.name in graph.inputs]
    del body.input[:], body.node[:], body.initializer[:]
    body.input.extend(inputs)
    body.node.extend(nodes)
    for weight in initializers:
        kind = TensorProto.FLOAT if weight.dtype == "float32" else TensorProto.FLOAT16
        body.initializer.add(name=weight.name, dims=weight.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    return initializers


def _fold_layouts(body: GraphProto, weights: dict[str, Weight]) -> list[NodeProto]:
    """The graph's nodes without those that only change the layout of a parameter; their results join ``weights``."""
    from onnx import numpy_helper

    constants = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in body.node
        if node.op_type == "Constant" and node.attribute[0].HasField("t")
    }
    nodes, renamed = [], dict[str, str]()
    for node in body.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        weight = weights.get(node.input[0]) if node.input else None
        if weight is None or (folded := _folded(node, weight, constants)) is None:
            nodes.append(node)
            continue
        equal = next((other for other in weights.values() if replace(other, name=folded.name) == folded), None)
        renamed[node.output[0]] = (equal or folded).name
        if equal is None:
            weights[folded.name] = folded
    read = {name for node in nodes for name in node.input}
    return [node for node in nodes if node.op_type != "Constant" or node.output[0] in read]


def _folded(node: NodeProto, weight: Weight, constants: Mapping[str, Any]) -> Weight | None:
    """``weight`` in the layout that a node gives it; None where the node does anything else."""
    name = f"{weight.key}:{node.op_type.lower()}"
    if node.op_type == "Identity":
        return weight
    only_permuted = weight.shape == tuple(weight.source[axis] for axis in weight.axes)
    if node.op_type == "Transpose" and only_permuted:
        axes = tuple(node.attribute[0].ints)
        return replace(
            weight, name=name, axes=tuple(weight.axes[a] for a in axes), shape=tuple(weight.shape[a] for a in axes)
        )
    if node.op_type == "Unsqueeze" and node.input[1] in constants:
        shape = list(weight.shape)
        new = [int(axis) % (len(shape) + constants[node.input[1]].size) for axis in constants[node.input[1]].flat]
        for axis in sorted(new):
            shape.insert(axis, 1)
        return replace(weight, name=f"{name}{''.join(map(str, sorted(new)))}", shape=tuple(shape))
    return None
