"""Whether an ONNX folder is its checkpoint: tensor by tensor in bytes, graph by graph in numbers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erasec.base import Check
from erasec.errors import ErasecError
from erasec.graphs.graph import CLASSES, Graph, graphs, with_whole_prompts
from erasec.graphs.link import PAGE, read_manifest, stored_tensor
from erasec.model import sidecar as extras_
from erasec.progress import bar, hush

if TYPE_CHECKING:
    from torch import Tensor, nn

    from erasec.checkpoint.folder import Folder

    Inputs = dict[str, Tensor]
    Case = tuple[Inputs, tuple[Tensor, ...]]
    Run = Callable[[str, Mapping[str, Any]], Sequence[Any]]  # graph's name and inputs -> outputs in the graph's order

# The largest difference over the largest number, by how weights are stored. On glyphs it is 5e-6 in float32, 6e-4 in
# float16 and 2.4e-2 in 256 levels a row; in random UNets of Stable Diffusion's size 3e-6, 1.3e-3 and 5.01e-2, so that
# these, which no picture hangs on, are refused in 256 levels.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}
# Sizes are (batch, height, width), in the steps that tracing.inputs tells of; none is the traced one.
TRIED = ((2, 2, 2), (1, 2, 3), (3, 4, 2))
STEPS = (0, 500, 981)
PROMPTS = ("", "a photo of a red star", "an oil painting of a ship at sea, highly detailed", "a green heart on black")


def tensors(checkpoint: Folder, exported: Path) -> tuple[Check, ...]:
    """Count the initializers on disk that are not, bit for bit, the checkpoint's tensors as the graph lays them out.

    Each file's own offsets are followed, and what the graph was not linked from is compared too.
    """
    import onnx

    carried, told = extras_.read(checkpoint.root), read_manifest(exported)
    checks = []
    with bar("compare weights", len(told["graphs"])) as advance:
        for graph in (each for each in graphs(checkpoint) if each.name in told["graphs"]):
            advance(0, graph.name)
            wrong, count, folder = [], 0, exported / graph.name
            try:
                model = onnx.load(folder / "model.onnx", load_external_data=False)
                wanted = stored_tensor(checkpoint, graph, told["graphs"][graph.name], carried)
                for tensor in model.graph.initializer:
                    count += 1
                    if not _same(tensor, folder, wanted(tensor.name)):
                        wrong.append(tensor.name)
            except (ErasecError, OSError, KeyError, ValueError) as error:
                wrong.append(f"{graph.name} ({error})")
            except Exception as error:  # protobuf's own
                wrong.append(f"{graph.name} ({type(error).__name__})")
            apart = len(told["graphs"][graph.name]["edited"])
            how = f"initializers that are not the checkpoint's tensors, bit for bit, of {count} ({apart} of them apart)"
            if wrong:
                how += f"; the first is {wrong[0]}"
            checks.append(Check(f"weights/{graph.name}", float(len(wrong)), 0.0, not wrong and count > 0, how))
            advance()
    return tuple(checks)


def _same(tensor: Any, folder: Path, wanted: Any) -> bool:
    place = {item.key: item.value for item in tensor.external_data}
    length, offset = int(place["length"]), int(place["offset"])
    if length != wanted.nbytes or tuple(tensor.dims) != wanted.shape or offset % PAGE:
        return False
    with (folder / place["location"]).open("rb") as stream:
        stream.seek(offset)
        return bool(stream.read(length) == wanted.tobytes())


def parity(
    checkpoint: Folder, exported: Path, *, seed: int = 0, tolerances: Mapping[str, float] = TOLERANCES,
    run: Run | None = None, runtime: str = "onnxruntime",
) -> tuple[Check, ...]:  # fmt: skip
    """Run every graph as it lies on disk, in onnxruntime or by ``run``, against torch in float32, on seeded inputs.

    The value is the worst of max |runtime - torch| / max |torch| over cases and outputs; it is infinite where an output
    is not finite or of another shape, or where the file cannot be loaded or run. ``tolerances`` are by precision. What
    fails is run again layer by layer, and the first that differs is named.
    """
    told = read_manifest(exported)["graphs"]
    every = [graph for graph in graphs(checkpoint) if graph.name in told]
    checks = []
    with bar(f"check {runtime}", len(every)) as advance:
        for graph in every:
            advance(0, graph.name)
            precision = told[graph.name]["precision"]
            checks.append(
                compared(checkpoint, graph, exported, precision, seed, tolerances[precision], run, runtime)
            )  # fmt: skip
            advance()
    return tuple(checks)


def compared(
    checkpoint: Folder, graph: Graph, exported: Path, precision: str, seed: int, tolerance: float,
    run: Run | None = None, runtime: str = "onnxruntime",
) -> Check:  # fmt: skip
    """``parity`` of one graph."""
    # Torch's answers first: at the size of Stable Diffusion, its weights and the runtime's need not be held together.
    cases = answered(checkpoint, graph, seed)
    worst, at = 0.0, ""
    try:
        call = (lambda given: run(graph.name, given)) if run else _session(exported / graph.name / "model.onnx", graph)
        for label, value in _differences(call, graph, cases):
            if value > worst or not at:
                worst, at = value, label
        del call
    except Exception as error:  # a damaged file fails in many ways, and each of them is the answer to the question
        reason = str(error).strip().splitlines() or [""]
        worst, at = float("inf"), f"{type(error).__name__}: {reason[0].replace(str(exported), '.')}"
    how = (
        f"max |{runtime} - torch| / max |torch|, {precision} against float32 on the CPU, {len(cases)} cases of seed "
        f"{seed}: {_ranges(cases)}; worst: {at}"
    )
    if worst > tolerance and run is None and (layer := _first_bad_layer(checkpoint, graph, exported, cases, tolerance)):
        how += f"; the first layer that differs is {layer}"
    return Check(f"parity/{graph.name}", worst, tolerance, worst <= tolerance, how)


def answered(checkpoint: Folder, graph: Graph, seed: int) -> list[Case]:
    """Seeded inputs of a graph, each with what torch makes of them; a UNet reads states of real prompts."""
    import torch

    from erasec.graphs.export import inputs

    states = _prompt_states(checkpoint) if graph.name == "unet" else None
    if graph.name == "text_encoder" and extras_.read(checkpoint.root).negative:
        graph = with_whole_prompts(graph)
    module, cases = load(checkpoint, graph), []
    draw = torch.Generator().manual_seed(seed)
    steps = STEPS if "timestep" in graph.inputs else (0,)
    with torch.no_grad():
        # Every step at the first size, and one at each of the others: large models take seconds for each.
        tried = [(TRIED[0], step) for step in steps] + list(zip(TRIED[1:], itertools.cycle(steps), strict=False))
        for number, (size, step) in enumerate(tried):
            given = inputs(checkpoint, graph, size, step, draw)
            if states is not None:
                rows = (torch.arange(size[0]) + number) % len(states)
                given["encoder_hidden_states"] = states[rows]
            answer = module(*given.values())
            cases.append((given, answer if isinstance(answer, tuple) else (answer,)))
        if graph.name == "text_encoder":
            ids = _prompt_ids(checkpoint)
            cases.append(({"input_ids": ids}, module(ids)))
    return cases


def _prompt_ids(checkpoint: Folder) -> Tensor:
    from transformers import CLIPTokenizer

    length = checkpoint.config("text_encoder")["max_position_embeddings"]
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint.root / "tokenizer")
    ids: Tensor = tokenizer(
        list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _prompt_states(checkpoint: Folder) -> Tensor:
    import torch

    graph = next(each for each in graphs(checkpoint) if each.name == "text_encoder")
    with torch.no_grad():
        states: Tensor = load(checkpoint, graph)(_prompt_ids(checkpoint))[0]
    return states


def _session(file: Path, graph: Graph, outputs: Sequence[str] = ()) -> Callable[[Inputs], Sequence[Any]]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wanted = list(outputs or graph.outputs)

    def call(given: Inputs) -> Sequence[Any]:
        found: Sequence[Any] = session.run(wanted, {name: value.numpy() for name, value in given.items()})
        return found

    return call


def _differences(
    call: Callable[[Inputs], Sequence[Any]], graph: Graph, cases: list[Case]
) -> Iterator[tuple[str, float]]:  # fmt: skip
    for given, answers in cases:
        told = ", ".join(f"{name} {_text(value)}" for name, value in given.items())
        for name, output, answer in zip(graph.outputs, call(given), answers, strict=True):
            yield f"{name} at {told}", relative(output, answer.numpy())


def relative(output: Any, answer: Any) -> float:
    """max |output - answer| / max |answer|; infinite for another shape, or where either is not finite."""
    if output.shape != answer.shape or not np.isfinite(output).all() or not np.isfinite(answer).all():
        return float("inf")
    difference, scale = float(np.abs(output.astype(np.float64) - answer).max()), float(np.abs(answer).max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _text(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) if value.dim() else f"{value.item():g}"


def _ranges(cases: list[Case]) -> str:
    texts = {name: dict.fromkeys(_text(given[name]) for given, _ in cases) for name in cases[0][0]}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in texts.items())


def load(checkpoint: Folder, graph: Graph) -> nn.Module:
    """The component in float32, its forward made to take the graph's inputs and give the graph's outputs.

    The checkpoint's memories are attached to its UNet; its tokens and negative prompt are the text encoder's.
    """
    import diffusers
    import torch
    import transformers

    from erasec.graphs.export import negative_ids, shaped

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
    carried = extras_.read(checkpoint.root)
    if graph.name == "unet" and carried.memories:
        from erasec.attention.processors import attach

        steps = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
        attach(module, carried.memories, steps)
    text = graph.name == "text_encoder"
    if text and carried.tokens:
        table = module.get_input_embeddings()
        table.weight = torch.nn.Parameter(torch.cat([table.weight, torch.stack(list(carried.tokens.values())).float()]))
    return shaped(module, graph, torch.float32, negative_ids(checkpoint, carried) if text else ())


def _first_bad_layer(
    checkpoint: Folder, graph: Graph, exported: Path, cases: list[Case], tolerance: float
) -> str:  # fmt: skip
    """The first layer, in the order in which torch runs them, whose output is another one; "" where none is found.

    The exporter names nodes by the modules that they come from, so that a layer's output is that of the last node in
    its scope.
    """
    import onnx
    import torch

    given = min(cases, key=lambda case: sum(value.numel() for value in case[0].values()))[0]
    module, seen = load(checkpoint, graph), dict[str, Any]()
    for name, layer in module.named_modules():
        if name and not any(layer.children()):

            def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    seen.setdefault(name, output.numpy().copy())

            layer.register_forward_hook(keep)
    folder = exported / graph.name
    try:
        with torch.no_grad():
            module(*given.values())
        del module
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        last = {node.name.rpartition("/")[0]: node.output[0] for node in model.graph.node}
        places = {name: last[scope] for name in seen if (scope := _scope(name)) in last}
        taken = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(each) for each in {*places.values()} - taken)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".layers-", suffix=".onnx") as file:
            file.write(model.SerializeToString())
            file.flush()
            outputs = _session(Path(file.name), graph, tuple(places.values()))(given)
    except Exception:  # what cannot be run has been told already
        return ""
    for name, output in zip(places, outputs, strict=True):
        if (off := relative(output, seen[name])) > tolerance:
            return f"{name} ({off:.2g})"
    return ""


def _scope(name: str) -> str:
    """A module's name as the exporter writes it: "a.0.b" is /a.0/b."""
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)
