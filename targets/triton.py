"""Target triton: a model repository of NVIDIA Triton Inference Server, and the small folder that its clients need.

    models/NAME/config.pbtxt, models/NAME/VERSION/model.onnx or model.plan     for the server
    client/model_index.json, tokenizer, scheduler, NAME/config.json            for whoever asks it for pictures

Triton takes every folder of its repository for a model, so that what is none lies beside it. What follows of its rules
is in its model_config.proto and in the checks of its backends when they load a model.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from erasec.base import Artifact, Check, Context, Target, require
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import copy
from erasec.errors import ErasecError, nearest
from erasec.graphs import link as linker
from erasec.graphs.graph import PRECISIONS, graphs
from erasec.graphs.parity import TOLERANCES, compared, tensors
from erasec.model import sidecar as extras
from erasec.progress import bar
from erasec.targets.trt import Trt
from erasec.targets.trt_rtx import checked
from erasec.tensorrt import engines

if TYPE_CHECKING:
    from erasec.graphs.graph import Graph
    from erasec.graphs.parity import Run
    from erasec.model.view import Model

    Port = tuple[str, tuple[int, ...]]  # its type as Triton calls it, and its shape, -1 where it is free

MODELS, CLIENT, CONFIG, ONNX = "models", "client", "config.pbtxt", "model.onnx"
# By what runs the models: its platform and its backend, as Triton calls them, and the file that it looks for.
ENGINES = {"onnx": ("onnxruntime_onnx", "onnxruntime", ONNX), "trt": ("tensorrt_plan", "tensorrt", "model.plan")}
NAMES = ("text_encoder", "unet", "vae_decoder")
KINDS = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
ELEMENTS = {1: "TYPE_FP32", 7: "TYPE_INT64"}  # by onnx.TensorProto.DataType
README = """# Text to image for Triton Inference Server

`models` is the model repository: `tritonserver --model-repository=models`.
Version {version} of each model is served, as its config.pbtxt says, and no other that lies beside it.

`client` is what a client needs: tokenizer, scheduler and configurations; it holds no weights.

| model | input | output |
|---|---|---|
{rows}
No batching by the server: a request brings its own batch as the first axis, and one timestep for all of it.
Inputs and outputs are float32, ids int64. Heights and widths of latents are multiples of what the UNet halves them by.
"""


@dataclass(frozen=True)
class Triton(Target):
    """Three models that a client runs in turn: text_encoder, unet and vae_decoder.

    ``version`` is the number under which they are served: give an erased variant a new one. ``instances`` is where they
    run, "auto", "gpu" or "cpu". ``precision`` is that of text encoder and UNet, "fp32" or "fp16". ``engines`` "trt" has
    TensorRT build plans here, which a server with the same version of it on such a GPU can run.
    """

    version: int = 1
    instances: str = "auto"
    precision: str = "fp32"
    engines: str = "onnx"

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "a model repository for Triton Inference Server"
    holds: ClassVar[frozenset[str]] = extras.KINDS

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ErasecError(f"triton: version is {self.version}", why="versions are whole numbers from 1 on")
        for option, known in (("instances", KINDS), ("precision", PRECISIONS), ("engines", ENGINES)):
            if (given := getattr(self, option)) not in known:
                raise ErasecError(f"triton: option {option} is {given!r}", why=nearest(given, known))
        if (self.engines, self.instances) == ("trt", "cpu"):
            raise ErasecError("triton: plans of TensorRT do not run on a CPU", fix="instances=auto, or engines=onnx")

    def check(self) -> None:
        require("the target triton", ("onnx", "onnxruntime"), "onnx")
        if self.engines == "trt":
            Trt(precision=self.precision).check()

    def size(self, model: Model) -> int:
        """The graphs, and as much again where plans are built from them. Raises ErasecError for a model of others."""
        graphs(model.source)
        return int(super().size(model) * (0.5 if self.precision == "fp16" else 1) * (2 if self.engines == "trt" else 1))

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, lay them out with their configurations, then check what the server will read and run.

        Raises ErasecError for models that the graphs do not cover.
        """
        self.check()
        models = out / MODELS
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as scratch:
            linked = Folder(Path(scratch))
            every = linker.write(checkpoint, linked.root, self.precision, NAMES)
            checks = tensors(checkpoint, linked.root)
            told = {graph.name: lined_up(linked.root / graph.name / ONNX) for graph in every}
            for name in linked.files():
                if not name.name.startswith("model.") and name.name != linker.MANIFEST:
                    copy(linked.root / name, out / CLIENT / name)
            for graph in every:
                version = models / graph.name / str(self.version)
                version.mkdir(parents=True, exist_ok=True)
                text = config(graph.name, *told[graph.name], self.version, KINDS[self.instances], self.engines)
                (version.parent / CONFIG).write_text(text)
                for file in sorted((linked.root / graph.name).glob("model.*") if self.engines == "onnx" else ()):
                    file.replace(version / file.name)
            if self.engines == "trt":
                checks += self._plans(checkpoint, linked.root, out)
            else:
                checks += parity(checkpoint, models, every, self.version, self.precision, context.seed)
            checks = served(models, linked.root), *checks
        (out / "README.md").write_text(readme(told, self.version))
        return Artifact(self.name, out, checks)

    def _plans(self, checkpoint: Folder, linked: Path, out: Path) -> tuple[Check, ...]:
        """Build the plans and describe them in engine.json; what they compute is not compared."""
        maker, entries, library = Trt(precision=self.precision), dict[str, dict[str, Any]](), ""
        every = maker.profiles(checkpoint)
        with bar("build plans", len(every)) as advance:
            for name, profile in every.items():
                advance(0, name)
                file = out / MODELS / name / str(self.version) / ENGINES["trt"][2]
                entries[name], library = maker.engine(linked / name / ONNX, file, profile)
                entries[name]["file"] = file.relative_to(out).as_posix()
                entries[name]["precision"] = "fp32" if name.startswith("vae") else self.precision
                advance()
        engines.write_record(out, maker.builder(), library, entries)
        return tuple(check for name in every for check in checked(out, name, linked / name / ONNX))


def lined_up(file: Path) -> tuple[dict[str, Port], dict[str, Port]]:
    """Inputs and outputs of an ONNX file, whose scalar inputs are made vectors of one number.

    Shapes in Triton have an axis at least, and its backend for plans, and that for ONNX before release 23.10, take no
    other shape than the graph's own.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    scalars = [value.name for value in model.graph.input if not value.type.tensor_type.shape.dim]
    for name in scalars:
        inner = f"{name}/scalar"
        for node in model.graph.node:
            node.input[:] = [inner if given == name else given for given in node.input]
        model.graph.node.insert(0, onnx.helper.make_node("Squeeze", [name], [inner], name=f"/{inner}"))
        value = next(value for value in model.graph.input if value.name == name)
        value.type.tensor_type.shape.dim.add().dim_value = 1
    if scalars:
        file.write_bytes(model.SerializeToString(deterministic=True))
    return {value.name: _port(value) for value in model.graph.input}, {
        value.name: _port(value) for value in model.graph.output
    }


def _port(value: Any) -> Port:
    kind = value.type.tensor_type
    return ELEMENTS[kind.elem_type], tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)


def config(
    name: str, inputs: Mapping[str, Port], outputs: Mapping[str, Port], version: int, kind: str = "KIND_AUTO",
    engine: str = "onnx",
) -> str:  # fmt: skip
    """The text of a model's config.pbtxt.

    ``max_batch_size`` 0 is "the shapes are whole": the server would batch only what has the batch as the first axis of
    every input, and a timestep has none. One version is named, so that a base that lies beside it is not served.
    """
    platform, backend, file = ENGINES[engine]
    lines = [
        f'name: "{name}"', f'platform: "{platform}"', f'backend: "{backend}"', f'default_model_filename: "{file}"',
        "max_batch_size: 0",
    ]  # fmt: skip
    for label, ports in (("input", inputs), ("output", outputs)):
        for port, (data_type, dims) in ports.items():
            shape = ", ".join(map(str, dims))
            lines.append(f'{label} {{\n  name: "{port}"\n  data_type: {data_type}\n  dims: [ {shape} ]\n}}')
    lines.append(f"instance_group {{\n  count: 1\n  kind: {kind}\n}}")
    lines.append(f"version_policy {{\n  specific {{\n    versions: [ {version} ]\n  }}\n}}")
    return "\n".join(lines) + "\n"


def parsed(text: str) -> dict[str, list[Any]]:
    """A configuration, written as ``config`` writes it, as lists of values by field; a message is such a dict again.

    Raises ErasecError where a line is none of "field: value", "field {" and "}".
    """
    open_ = [dict[str, list[Any]]()]
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if match := re.fullmatch(r"(\w+) \{", line):
            inner = dict[str, list[Any]]()
            open_[-1].setdefault(match[1], []).append(inner)
            open_.append(inner)
        elif match := re.fullmatch(r'(\w+): ("[^"\\]*"|-?\d+|\[[-\d, ]*\])', line):
            open_[-1].setdefault(match[1], []).append(json.loads(match[2]))
        elif match := re.fullmatch(r"(\w+): ([A-Z]\w*)", line):
            open_[-1].setdefault(match[1], []).append(match[2])
        elif line == "}" and len(open_) > 1:
            open_.pop()
        else:
            raise ErasecError(f"{CONFIG} cannot be read", why=f"line {number} is {line!r}")
    if len(open_) > 1:
        raise ErasecError(f"{CONFIG} cannot be read", why="a message is not closed")
    return open_[0]


def served(models: Path, graphs: Path) -> Check:
    """Count what would keep Triton from serving a repository's models as they are meant, by what lies on disk.

    ``graphs`` is where the ONNX files lie that plans were built from.
    """
    wrong = [fault for folder in sorted(models.iterdir()) for fault in faults(folder, graphs)]
    wrong += [f"there is no {name}" for name in NAMES if not (models / name).is_dir()]
    how = f"faults in {len(NAMES)} configurations: files, names, types and shapes, against the graphs in onnxruntime"
    if wrong:
        how += f"; the first: {wrong[0]}"
    return Check("triton/repository", float(len(wrong)), 0.0, not wrong, how)


def faults(folder: Path, graphs: Path) -> list[str]:
    """What is wrong with one folder of a repository, each in a sentence; empty for a model that Triton can serve."""
    if folder.name not in NAMES:
        return [f"{folder.name} would be taken for a model"]
    try:
        told = parsed((folder / CONFIG).read_text())
        (version,) = told["version_policy"][0]["specific"][0]["versions"][0]
        (file,), (backend,) = told["default_model_filename"], told["backend"]
        ports = [{port["name"][0]: (port["data_type"][0], tuple(port["dims"][0])) for port in told[label]}
                 for label in ("input", "output")]  # fmt: skip
        found = told["name"][0], told["max_batch_size"][0], (told["platform"][0], backend, file)
    except (ErasecError, OSError, KeyError, ValueError, TypeError) as error:
        return [f"{folder.name} has no sound {CONFIG}: {error!r}"]
    wrong, model = [], folder / str(version) / file
    if found[:2] != (folder.name, 0) or found[2] not in ENGINES.values():
        wrong.append(f"{folder.name}: name, max_batch_size and what runs it are {found}")
    if not model.is_file():
        return [*wrong, f"{folder.name} has no {version}/{file}"]
    try:
        seen = _seen(graphs / folder.name / ONNX if backend == "tensorrt" else model)
    except Exception as error:  # whatever the server would say when it loads it
        return [*wrong, f"{folder.name}/{version}/{file} cannot be loaded: {str(error).splitlines()[0]}"]
    for label, given, there in zip(("input", "output"), ports, seen, strict=True):
        wrong += [f"{folder.name}: {label} {name} is {given.get(name)} in {CONFIG} and {there.get(name)} in the model"
                  for name in sorted(given.keys() | there.keys()) if given.get(name) != there.get(name)]  # fmt: skip
    return wrong


def _seen(file: Path) -> list[dict[str, Port]]:
    """Inputs and outputs as Triton's backend is told them, which is by onnxruntime once it has loaded the file."""
    session = _session(file, "ORT_DISABLE_ALL")
    return [
        {
            port.name: (TYPES.get(port.type, port.type), tuple(x if isinstance(x, int) else -1 for x in port.shape))
            for port in values
        }
        for values in (session.get_inputs(), session.get_outputs())
    ]


def _session(file: Path, level: str = "ORT_ENABLE_ALL") -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def parity(
    checkpoint: Folder, models: Path, every: Sequence[Graph], version: int, precision: str = "fp32", seed: int = 0
) -> tuple[Check, ...]:  # fmt: skip
    """Run every model as it lies in the repository, on inputs of the shapes that it is served with, against torch."""
    checks = []
    with bar("check triton", len(every)) as advance:
        for graph in every:
            advance(0, graph.name)
            kind = "fp32" if graph.component == "vae" else precision
            run = _runner(models / graph.name / str(version) / ONNX)
            checks.append(compared(checkpoint, graph, models, kind, seed, TOLERANCES[kind], run))
            advance()
    return tuple(checks)


def _runner(file: Path) -> Run:
    loaded = cache(lambda: _session(file))  # when it is first run, so that what fails then is told by the check

    def run(name: str, given: Mapping[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = loaded().run(None, {key: np.atleast_1d(value) for key, value in given.items()})
        return outputs

    return run


def readme(told: Mapping[str, tuple[Mapping[str, Port], Mapping[str, Port]]], version: int) -> str:
    """The repository's README: how to serve it, and what each model takes and gives."""
    rows = ""
    for name, ports in told.items():
        cells = ("; ".join(f"`{port}` {list(dims)}" for port, (_, dims) in values.items()) for values in ports)
        rows += f"| {name} | {' | '.join(cells)} |\n"
    return README.format(version=version, rows=rows)
