"""Compares an ONNX folder with its checkpoint: weights byte by byte, and outputs of graphs with those of torch."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erasec.base import Check
from erasec.checkpoint.configs import described_by
from erasec.errors import ErasecError
from erasec.graphs.conditioning import text_inputs
from erasec.graphs.graph import MODEL
from erasec.graphs.link import PAGE, tensor_reader
from erasec.graphs.manifest import read_manifest
from erasec.graphs.session import OnnxSession
from erasec.graphs.signature import (
    DENOISERS,
    Graph,
    configs,
    graphs,
    layout,
    num_train_timesteps,
    text_length,
    with_whole_prompts,
)
from erasec.graphs.weights import external_data
from erasec.model.sidecar import read_extras
from erasec.progress import bar, disable_library_bars

if TYPE_CHECKING:
    from torch import Tensor, nn

    from erasec.checkpoint.folder import Folder
    from erasec.runtime.backends import Component

    Inputs = dict[str, Tensor]
    Case = tuple[Inputs, tuple[Tensor, ...]]  # inputs by name, and torch's outputs in the graph's order
    Load = Callable[[Graph], Component]  # opens the file of a graph

# Limits of the largest difference divided by the largest number, by how weights are stored. On glyphs this is 5e-6 in
# float32, 6e-4 in float16 and 2.4e-2 with 256 levels per channel. In random UNets of Stable Diffusion's size it is
# 3e-6, 1.3e-3 and 5.01e-2, so random weights with 256 levels are refused.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}
# Sizes of the cases, as ``export.sample_inputs`` takes them; none is the size that graphs are traced with.
SIZES = ((2, 2, 2), (1, 2, 3), (3, 4, 2))
TIMESTEPS = (0, 500, 981)
PROMPTS = ("", "a photo of a red star", "an oil painting of a ship at sea, highly detailed", "a green heart on black")


def compare_weights(checkpoint: Folder, exported: Path) -> tuple[Check, ...]:
    """One check for each graph of an ONNX folder: count initializers whose bytes are not the checkpoint's tensors.

    The data are read at the offsets that the graph's file gives, and the whole folder is compared, edited or not.
    """
    import onnx

    extras, manifest = read_extras(checkpoint.root), read_manifest(exported)
    checks = []
    with bar("compare weights", len(manifest["graphs"])) as advance:
        for graph in (graph for graph in graphs(checkpoint) if graph.name in manifest["graphs"]):
            advance(0, graph.name)
            wrong, count, folder = [], 0, exported / graph.name
            linked = manifest["graphs"][graph.name]
            try:
                model = onnx.load(folder / MODEL, load_external_data=False)
                read = tensor_reader(checkpoint, graph, linked, extras)
                for tensor in model.graph.initializer:
                    count += 1
                    if not _same_bytes(tensor, folder, read(tensor.name)):
                        wrong.append(tensor.name)
            except ErasecError as error:
                wrong.append(f"{graph.name} ({error.what}: {error.why})")
            except (OSError, KeyError, ValueError) as error:
                wrong.append(f"{graph.name} ({error})")
            except Exception as error:  # protobuf's errors have no common class
                wrong.append(f"{graph.name} ({type(error).__name__})")
            if not count and not wrong:
                wrong.append(f"{graph.name} (it has no initializers)")
            how = (
                f"initializers that are not the checkpoint's tensors, bit for bit, of {count} "
                f"({len(linked['edited'])} of them edited)"
            )
            checks.append(Check.count(f"weights/{graph.name}", wrong, how))
            advance()
    return tuple(checks)


def _same_bytes(tensor: Any, folder: Path, expected: Any) -> bool:
    """Whether the data of an initializer are those of the array ``expected``, and begin on a page."""
    file, offset, length = external_data(folder, tensor)
    if length != expected.nbytes or tuple(tensor.dims) != expected.shape or offset % PAGE:
        return False
    with file.open("rb") as stream:
        stream.seek(offset)
        return bool(stream.read(length) == expected.tobytes())


def compare_outputs(
    checkpoint: Folder,
    exported: Path,
    precisions: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    tolerances: Mapping[str, float] = TOLERANCES,
    load: Load | None = None,
    runtime: str = "onnxruntime",
) -> tuple[Check, ...]:
    """One check for each graph of a folder: run it on seeded inputs and compare it with torch in float32.

    ``precisions`` are how coarsely weights are stored, by graph; by default those of the folder's manifest. They select
    the graphs, and one of the ``tolerances`` for each. ``load`` opens a graph's file in the library called ``runtime``,
    by default in onnxruntime.

    The value is the largest max |runtime - torch| / max |torch| over cases and outputs. It is infinite where an output
    is not finite or of another shape, or where the file cannot be loaded or run. Where a graph fails in onnxruntime,
    the check names the first layer that differs.
    """
    if precisions is None:
        precisions = {name: graph["precision"] for name, graph in read_manifest(exported)["graphs"].items()}
    selected = [graph for graph in graphs(checkpoint) if graph.name in precisions]
    checks = []
    with bar(f"check {runtime}", len(selected)) as advance:
        for graph in selected:
            advance(0, graph.name)
            kind = precisions[graph.name]
            checks.append(compare_graph(checkpoint, graph, exported, kind, seed, tolerances[kind], load, runtime))
            advance()
    return tuple(checks)


def compare_graph(
    checkpoint: Folder,
    graph: Graph,
    exported: Path,
    precision: str,
    seed: int,
    tolerance: float,
    load: Load | None = None,
    runtime: str = "onnxruntime",
) -> Check:
    """``compare_outputs`` for one graph."""
    # Torch runs first, so that its weights and the runtime's are never in memory together.
    cases = torch_cases(checkpoint, graph, seed)
    try:
        worst, label = _worst_difference(load or _loader(exported), graph, cases)
    except Exception as error:  # a damaged file raises errors of many classes, and each means that the check fails
        reason = str(error).strip().splitlines() or [""]
        worst, label = float("inf"), f"{type(error).__name__}: {reason[0].replace(str(exported), '.')}"
    how = (
        f"max |{runtime} - torch| / max |torch|, {precision} against float32 on the CPU, {len(cases)} cases of seed "
        f"{seed}: {_ranges(cases)}; worst: {label}"
    )
    if (
        worst > tolerance
        and load is None
        and (layer := _first_wrong_layer(checkpoint, graph, exported, cases, tolerance))
    ):
        how += f"; the first layer that differs is {layer}"
    return Check.at_most(f"parity/{graph.name}", worst, tolerance, how)


def _loader(exported: Path) -> Load:
    """Opens graphs of an ONNX folder in onnxruntime, on the CPU."""
    return lambda graph: _open_session(exported / graph.name / MODEL)


def _open_session(file: Path) -> OnnxSession:
    import torch

    return OnnxSession(file, torch.get_num_threads())


def torch_cases(checkpoint: Folder, graph: Graph, seed: int) -> list[Case]:
    """Seeded inputs of a graph, each with torch's outputs; a denoiser gets text states of real prompts."""
    import torch

    from erasec.graphs.export import sample_inputs

    texts = _prompt_inputs(checkpoint) if graph.denoises else {}
    if graph.component == "text_encoder" and read_extras(checkpoint.root).negative:
        graph = with_whole_prompts(graph)
    module, cases = load_module(checkpoint, graph), []
    rng = torch.Generator().manual_seed(seed)
    timesteps = TIMESTEPS if "timestep" in graph.inputs else (0,)
    with torch.no_grad():
        # All timesteps at the first size, and one at each other size: large models take seconds for every case.
        sizes = [(SIZES[0], timestep) for timestep in timesteps]
        sizes += zip(SIZES[1:], itertools.cycle(timesteps), strict=False)
        for number, (size, timestep) in enumerate(sizes):
            inputs = sample_inputs(checkpoint, graph, size, timestep, rng)
            rows = (torch.arange(size[0]) + number) % len(PROMPTS)
            inputs |= {name: values[rows] for name, values in texts.items()}
            outputs = module(*inputs.values())
            cases.append((inputs, outputs if isinstance(outputs, tuple) else (outputs,)))
        if graph.encodes_text:
            ids = _prompt_ids(checkpoint, graph.component)
            cases.append(({"input_ids": ids}, module(ids)))
    return cases


def _prompt_ids(checkpoint: Folder, encoder: str) -> Tensor:
    """Token ids of ``PROMPTS`` (4, tokens) for a text encoder."""
    from erasec.model.text_encoders import load_tokenizer

    ids: Tensor = load_tokenizer(checkpoint, encoder)(
        list(PROMPTS),
        padding="max_length",
        max_length=text_length(encoder, configs(checkpoint)),
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def _prompt_inputs(checkpoint: Folder) -> dict[str, Tensor]:
    """The inputs of the denoiser that depend on the prompt alone, for ``PROMPTS``: text states (4, tokens, d).

    The text encoders are in memory one after the other.
    """
    import torch

    by_name = {graph.name: graph for graph in graphs(checkpoint)}

    def encode(name: str) -> dict[str, Any]:
        graph = by_name[name]
        with torch.no_grad():
            outputs = load_module(checkpoint, graph)(_prompt_ids(checkpoint, name))
        return {key: value.numpy() for key, value in zip(graph.outputs, outputs, strict=True)}

    inputs = text_inputs(layout(checkpoint), configs(checkpoint), encode)
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _worst_difference(load: Load, graph: Graph, cases: Sequence[Case]) -> tuple[float, str]:
    """The largest relative error over all cases and outputs, and the output and case that has it."""
    with closing(load(graph)) as component:
        differences = list(_differences(component, graph, cases))
    return max(differences, key=lambda difference: difference[0])


def _differences(component: Component, graph: Graph, cases: Sequence[Case]) -> Iterator[tuple[float, str]]:
    """The relative error of every output in every case."""
    for inputs, expected in cases:
        case = ", ".join(f"{name} {_text(value)}" for name, value in inputs.items())
        outputs = component.run({name: value.numpy() for name, value in inputs.items()})
        for name, tensor in zip(graph.outputs, expected, strict=True):
            yield relative_error(outputs[name], tensor.numpy()), f"{name} at {case}"


def relative_error(output: Any, expected: Any) -> float:
    """max |output - expected| / max |expected|; infinite where the shapes differ or a number is not finite."""
    if output.shape != expected.shape or not np.isfinite(output).all() or not np.isfinite(expected).all():
        return float("inf")
    difference, scale = float(np.abs(output.astype(np.float64) - expected).max()), float(np.abs(expected).max())
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _text(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) if value.dim() else f"{value.item():g}"


def _ranges(cases: Sequence[Case]) -> str:
    """The shapes and timesteps of all cases, by input."""
    texts = {name: dict.fromkeys(_text(inputs[name]) for inputs, _ in cases) for name in cases[0][0]}
    return "; ".join(f"{name} {', '.join(values)}" for name, values in texts.items())


def load_module(checkpoint: Folder, graph: Graph) -> nn.Module:
    """The component in torch and float32, with a forward that takes the graph's inputs and returns its outputs.

    The denoiser has the checkpoint's memories; the first text encoder has its new tokens and its negative prompt.
    Raises ErasecError where a tensor is missing.
    """
    import diffusers
    import torch
    import transformers

    from erasec.graphs.export import negative_ids, with_graph_signature

    disable_library_bars()
    library, dtype = (transformers, "dtype") if graph.encodes_text else (diffusers, "torch_dtype")
    cls: Any = getattr(library, graph.kind)
    options: dict[str, Any] = {dtype: torch.float32, "use_safetensors": True, "output_loading_info": True}
    options["variant"] = checkpoint.variant_of(graph.component) or None
    with described_by(graph.component, checkpoint.root):
        module, info = cls.from_pretrained(checkpoint.root / graph.component, **options)
    if missing := sorted(info["missing_keys"]):
        raise ErasecError(
            f"onnx: {graph.component} has no {missing[0]}",
            why=f"{len(missing)} tensors are missing, and random numbers would take their place",
            where=str(checkpoint.root / graph.component),
            fix="fetch the model again",
        )
    module.eval()
    extras = read_extras(checkpoint.root)
    if graph.name in DENOISERS and extras.memories:
        from erasec.attention.processors import attach

        attach(module, extras.memories, num_train_timesteps(checkpoint))
    text = graph.component == "text_encoder"
    if text and extras.tokens:
        embedding = module.get_input_embeddings()
        new_rows = torch.stack(list(extras.tokens.values())).float()
        embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight, new_rows]))
    return with_graph_signature(module, graph, torch.float32, negative_ids(checkpoint, extras) if text else ())


def _first_wrong_layer(
    checkpoint: Folder, graph: Graph, exported: Path, cases: Sequence[Case], tolerance: float
) -> str:
    """The first layer, in the order in which torch runs them, whose output differs; "" where none does.

    The exporter names nodes by the modules that they come from, so the output of a layer is that of the last node in
    its scope.
    """
    import onnx
    import torch

    inputs = min(cases, key=lambda case: sum(value.numel() for value in case[0].values()))[0]
    module, expected = load_module(checkpoint, graph), dict[str, Any]()
    for name, layer in module.named_modules():
        if name and not any(layer.children()):

            def record(_: Any, __: Any, output: Any, name: str = name) -> None:
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    expected.setdefault(name, output.numpy().copy())

            layer.register_forward_hook(record)
    folder = exported / graph.name
    try:
        with torch.no_grad():
            module(*inputs.values())
        del module
        model = onnx.load(folder / MODEL, load_external_data=False)
        last = {node.name.rpartition("/")[0]: node.output[0] for node in model.graph.node}
        names = {layer: last[scope] for layer in expected if (scope := _scope(layer)) in last}
        present = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in {*names.values()} - present
        )
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".layers-", suffix=".onnx") as file:
            file.write(model.SerializeToString())
            file.flush()
            session = _open_session(Path(file.name))
            outputs = session.run({name: value.numpy() for name, value in inputs.items()}, tuple(names.values()))
    except Exception:  # the check says already that the graph cannot be run
        return ""
    for layer, name in names.items():
        if (error := relative_error(outputs[name], expected[layer])) > tolerance:
            return f"{layer} ({error:.2g})"
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
