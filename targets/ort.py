"""Target onnx: the four graphs of Stable Diffusion in the layout that ORTStableDiffusionPipeline.from_pretrained reads.

The TorchScript exporter is used although torch calls it deprecated: for glyphs it takes 2 s where the dynamo exporter
takes 50 s, it writes neither stack traces nor paths into the file, and its axes keep their names. What a tracer can get
wrong, sizes and steps frozen into the graph, is what ``parity`` looks for: no case has the traced shape.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from erasec.base import Artifact, Check, Context, Target
from erasec.errors import ErasecError, MissingTool
from erasec.extras import read, refuse
from erasec.progress import bar, hush

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from erasec.folder import Folder

    Size = tuple[int, int, int]
    Inputs = dict[str, Tensor]
    Case = tuple[Inputs, tuple[Tensor, ...]]

OPSETS = range(17, 21)  # from LayerNormalization to the last that the exporter knows
# A protobuf file ends at 2 GiB, and what reads one holds it twice: half of that is embedded, more goes beside it.
EMBEDDED = 1024**3
TOLERANCE = 1e-4  # the graphs are measured to 4e-6
# Sizes are (batch, height, width), in the steps that _inputs tells of.
LATENTS = 4
TRACED = (4, 2, 4)
TRIED = ((2, 2, 2), (1, 2, 3), (3, 4, 2))
STEPS = (1, 500, 981)
CLASSES = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
COPIED = ("scheduler", "tokenizer", "feature_extractor")
LEFT_OUT = ("safety_checker", "image_encoder")  # the reader of this layout takes them from elsewhere, or does without
# What old configs lack and the reader then guesses wrongly or warns about; the values are diffusers' own defaults.
DEFAULTS: dict[str, dict[str, Any]] = {"unet": {"time_cond_proj_dim": None}, "vae": {"scaling_factor": 0.18215}}
MORE_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")

Axes = Mapping[int, str]


@dataclass(frozen=True)
class Graph:
    """One file model.onnx: its folder, the component whose weights it holds, and its inputs and outputs with the names
    of their dynamic axes. An output's axis may be computed, as in "height * 8": ONNX pipelines evaluate that."""

    name: str
    component: str
    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]


@dataclass(frozen=True)
class Onnx(Target):
    """Float32 graphs with dynamic batch and size. Heights and widths of latents are multiples of what the UNet halves
    them by (8 for Stable Diffusion), as in every export of it."""

    opset: int = 18
    tolerance: float = TOLERANCE

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "ONNX graphs for onnxruntime, in the layout of ORTStableDiffusionPipeline"
    holds: ClassVar[frozenset[str]] = frozenset({"memory"})

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ErasecError(f"onnx: opset {self.opset} cannot be written", why=f"{OPSETS[0]} to {OPSETS[-1]} can")
        if not self.tolerance > 0:
            raise ErasecError(f"onnx: tolerance is {self.tolerance}", why="it must be above 0")

    def check(self) -> None:
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingTool(
                f"the target onnx needs {' and '.join(missing)}", why="not installed", fix='pip install "erasec[onnx]"'
            )

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write all graphs, then check each against torch. Raises ErasecError where a component is of another kind."""
        self.check()
        refuse(read(checkpoint.root), self.holds, self.name)
        every = graphs(checkpoint)
        for name in checkpoint.files():
            if name.parts[0] in COPIED or name.as_posix() == "model_index.json":
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.root / name, out / name)
        with bar("export onnx", len(every)) as advance:
            for graph in every:
                advance(0, graph.name)
                folder = out / graph.name
                folder.mkdir(parents=True, exist_ok=True)
                config = DEFAULTS.get(graph.component, {}) | checkpoint.config(graph.component)
                (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
                self._trace(checkpoint, graph, folder)
                advance()
        checks = parity(checkpoint, out, seed=context.seed, tolerance=self.tolerance)
        return Artifact(self.name, out, checks)

    def _trace(self, checkpoint: Folder, graph: Graph, folder: Path) -> None:
        import torch

        module = _load(checkpoint, graph)
        inputs = _inputs(checkpoint, graph, TRACED, 300, torch.Generator().manual_seed(0))
        # Above 2 GiB torch writes one file a tensor beside the graph, so it gets a folder of its own.
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's deprecation, and the branches that parity then tries
            torch.onnx.export(
                module, tuple(inputs.values()), str(Path(scratch) / "model.onnx"),
                input_names=list(graph.inputs), output_names=list(graph.outputs),
                dynamic_axes={**graph.inputs, **graph.outputs}, opset_version=self.opset, dynamo=False,
            )  # fmt: skip
            del module
            pack(Path(scratch), folder)


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
    scale = _halvings(checkpoint.config("vae"))
    larger = {0: "batch", 2: f"height * {scale}", 3: f"width * {scale}"}
    smaller = {0: "batch", 2: f"height // {scale}", 3: f"width // {scale}"}
    return (
        Graph("text_encoder", "text_encoder", {"input_ids": tokens},
              {"last_hidden_state": tokens, "pooler_output": batch}),
        Graph("unet", "unet", {"sample": size, "timestep": {}, "encoder_hidden_states": tokens}, {"out_sample": size}),
        Graph("vae_decoder", "vae", {"latent_sample": size}, {"sample": larger}),
        Graph("vae_encoder", "vae", {"sample": size}, {"latent_parameters": smaller}),
    )  # fmt: skip


def parity(checkpoint: Folder, exported: Path, *, seed: int = 0, tolerance: float = TOLERANCE) -> tuple[Check, ...]:
    """Run every graph as it lies on disk, in onnxruntime, against torch in float32, on seeded inputs.

    The value is the worst of max |onnxruntime - torch| / max |torch| over cases and outputs; it is infinite where an
    output is not finite or of another shape, or where the file cannot be loaded or run.
    """
    every = graphs(checkpoint)
    checks = []
    with bar("check onnx", len(every)) as advance:
        for graph in every:
            advance(0, graph.name)
            checks.append(_parity(checkpoint, graph, exported, seed, tolerance))
            advance()
    return tuple(checks)


def _parity(checkpoint: Folder, graph: Graph, exported: Path, seed: int, tolerance: float) -> Check:
    # Torch's answers first: at the size of Stable Diffusion, its weights and onnxruntime's need not be held together.
    cases = _answered(checkpoint, graph, seed)
    worst, at = 0.0, ""
    try:
        for label, value in _differences(exported / graph.name / "model.onnx", graph, cases):
            if value > worst or not at:
                worst, at = value, label
    except Exception as error:  # a damaged file fails in many ways, and each of them is the answer to the question
        reason = str(error).strip().splitlines() or [""]
        worst, at = float("inf"), f"{type(error).__name__}: {reason[0].replace(str(exported), '.')}"
    how = (
        f"max |onnxruntime - torch| / max |torch|, float32 on the CPU, {len(cases)} cases of seed {seed}: "
        f"{_ranges(cases)}; worst: {at}"
    )
    return Check(f"parity/{graph.name}", worst, tolerance, worst <= tolerance, how)


def _answered(checkpoint: Folder, graph: Graph, seed: int) -> list[Case]:
    import torch

    module, cases = _load(checkpoint, graph), []
    draw = torch.Generator().manual_seed(seed)
    steps = STEPS if "timestep" in graph.inputs else (0,)
    with torch.no_grad():
        for size, step in itertools.product(TRIED, steps):
            inputs = _inputs(checkpoint, graph, size, step, draw)
            answer = module(*inputs.values())
            cases.append((inputs, answer if isinstance(answer, tuple) else (answer,)))
    return cases


def _differences(file: Path, graph: Graph, cases: list[Case]) -> Iterator[tuple[str, float]]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for inputs, answers in cases:
        outputs = session.run(list(graph.outputs), {name: value.numpy() for name, value in inputs.items()})
        given = ", ".join(f"{name} {_text(value)}" for name, value in inputs.items())
        for name, output, answer in zip(graph.outputs, outputs, answers, strict=True):
            yield f"{name} at {given}", _relative(torch.from_numpy(output), answer)


def _relative(output: Tensor, answer: Tensor) -> float:
    if output.shape != answer.shape or not bool(output.isfinite().all()) or not bool(answer.isfinite().all()):
        return float("inf")
    difference, scale = float((output - answer).abs().max()), float(answer.abs().max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _text(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) if value.dim() else f"{value.item():g}"


def _ranges(cases: list[Case]) -> str:
    texts = {name: dict.fromkeys(_text(inputs[name]) for inputs, _ in cases) for name in cases[0][0]}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in texts.items())


def _load(checkpoint: Folder, graph: Graph) -> Any:
    """The component in float32, its forward made to take the graph's inputs and give the graph's outputs.

    The checkpoint's memories are attached to its UNet, and so are constants of the graph.
    """
    import diffusers
    import torch
    import transformers

    hush()
    library, dtype = (transformers, "dtype") if graph.component == "text_encoder" else (diffusers, "torch_dtype")
    kind: Any = getattr(library, CLASSES[graph.component])
    options: dict[str, Any] = {dtype: torch.float32, "use_safetensors": True, "output_loading_info": True}
    options["variant"] = checkpoint.variant_of(graph.component) or None
    module, info = kind.from_pretrained(checkpoint.root / graph.component, **options)
    if missing := sorted(info["missing_keys"]):
        raise ErasecError(
            f"onnx: {graph.component} has no {missing[0]}", why=f"{len(missing)} tensors would be random numbers",
            where=str(checkpoint.root / graph.component),
        )  # fmt: skip
    module.eval()
    if graph.name == "unet" and (memories := read(checkpoint.root).memories):
        from erasec.attach import attach

        steps = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
        attach(module, memories, steps)
    forward = module.forward
    if graph.name == "text_encoder":
        module.forward = lambda ids: forward(ids, return_dict=False)[:2]
    elif graph.name == "unet":
        module.forward = lambda sample, step, states: forward(sample, step, states, return_dict=False)[0]
    elif graph.name == "vae_decoder":
        module.forward = lambda latents: module.decode(latents, return_dict=False)[0]
    else:
        module.forward = lambda images: module.encode(images).latent_dist.parameters
    return module


def _inputs(checkpoint: Folder, graph: Graph, size: Size, step: int, draw: Generator) -> Inputs:
    """Seeded inputs of one size, (batch, height, width) in the least steps that the graph's latents can take: 4 latents
    for glyphs, 8 (64 pixels) for Stable Diffusion. So a case is small whatever the model's own size."""
    import torch

    batch, height, width = size
    text, unet, vae = (checkpoint.config(component) for component in CLASSES)
    if graph.name == "text_encoder":
        # Prompts that end at different places, padded with the end token as tokenizers do; the taller, the shorter.
        length, end = 2 * text["max_position_embeddings"] // height, text["vocab_size"] - 1
        ids = torch.randint(0, end, (batch, length), generator=draw)
        for row in range(batch):
            ids[row, length // (row + 2) :] = end
        return {"input_ids": ids}
    if graph.name == "vae_encoder":
        scale = LATENTS * _halvings(vae)
        pixels = torch.rand(batch, vae["in_channels"], height * scale, width * scale, generator=draw)
        return {"sample": pixels * 2 - 1}
    if graph.name == "vae_decoder":
        shape = batch, vae["latent_channels"], height * LATENTS, width * LATENTS
        return {"latent_sample": torch.randn(shape, generator=draw)}
    scale = _halvings(unet)
    states = batch, text["max_position_embeddings"], unet["cross_attention_dim"]
    return {
        "sample": torch.randn(batch, unet["in_channels"], height * scale, width * scale, generator=draw),
        "timestep": torch.tensor(float(step)),  # float, as some schedulers step between whole numbers
        "encoder_hidden_states": torch.randn(states, generator=draw),
    }


def _halvings(config: Mapping[str, Any]) -> int:
    """How much smaller the lowest level of a UNet or VAE is than its first."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def pack(scratch: Path, folder: Path, embedded: int = EMBEDDED) -> None:
    """Move ``scratch``'s model.onnx, and what tensors lie beside it, to ``folder``.

    Above ``embedded`` bytes in all, every weight goes to one file model.onnx_data; it is copied tensor by tensor.
    """
    import onnx

    if sum(path.stat().st_size for path in scratch.iterdir()) <= embedded:
        (scratch / "model.onnx").replace(folder / "model.onnx")
        return
    model = onnx.load(scratch / "model.onnx", load_external_data=False)
    with (folder / "model.onnx_data").open("wb") as stream:
        for tensor in model.graph.initializer:
            where = {item.key: item.value for item in tensor.external_data}
            data = (scratch / where["location"]).read_bytes() if where else tensor.raw_data
            if not data:
                continue
            place = {"location": "model.onnx_data", "offset": str(stream.tell()), "length": str(len(data))}
            stream.write(data)
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
