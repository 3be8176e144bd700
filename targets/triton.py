"""Target triton: a model repository of NVIDIA Triton Inference Server, and the small folder that its clients need.

    models/NAME/config.pbtxt, models/NAME/VERSION/model.onnx or model.plan     for the server
    client/model_index.json, tokenizer, scheduler, NAME/config.json            for its clients

Triton loads every folder of its repository as a model, so all other files lie outside it. Triton's rules are those of
its model_config.proto, and of the checks that its backends make when they load a model.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import copy_file
from erasec.documents import read_text
from erasec.errors import ErasecError, require_modules
from erasec.graphs import parity
from erasec.graphs.cache import GRAPHS_BYTES
from erasec.graphs.graph import MODEL
from erasec.graphs.link import BASE, EDITED, write_onnx
from erasec.graphs.manifest import MANIFEST
from erasec.graphs.parity import compare_weights
from erasec.graphs.same import compare_graph, files_checks
from erasec.graphs.session import OnnxSession
from erasec.graphs.signature import NAMES, graphs
from erasec.model.sidecar import KINDS
from erasec.options import options
from erasec.progress import bar
from erasec.runtime.backends import with_vectors
from erasec.runtime.schedulers import sampling_notes
from erasec.targets.trt import Trt
from erasec.tensorrt import engines
from erasec.tensorrt.base import UNREAD, enforced, engine_checks

if TYPE_CHECKING:
    from erasec.graphs.signature import Graph
    from erasec.model.view import Model
    from erasec.runtime.backends import Component

    Port = tuple[str, tuple[int, ...]]  # Triton's name of its type, and its shape, -1 for dynamic axes
    Ports = Mapping[str, Port]

SERVED = tuple(name for name in NAMES if name != "vae_encoder")  # which image to image alone needs
MODELS, CLIENT, CONFIG = "models", "client", "config.pbtxt"
# By what runs the models: Triton's names of platform and backend, and the file that the backend loads.
ENGINES = {"onnx": ("onnxruntime_onnx", "onnxruntime", MODEL), "trt": ("tensorrt_plan", "tensorrt", "model.plan")}
INSTANCES = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}  # by onnxruntime's name
ELEMENTS = {1: "TYPE_FP32", 7: "TYPE_INT64"}  # by onnx.TensorProto.DataType
README = """# Text to image for Triton Inference Server

`models` is the model repository: `tritonserver --model-repository=models`.
Version {version} of each model is served, as its config.pbtxt says, and no other that lies beside it.

`client` is what a client needs: tokenizer, scheduler and configurations; it holds no weights.

| model | input | output |
|---|---|---|
{rows}
No batching by the server: a request brings its own batch as the first axis. A timestep of a UNet is one number for all
of it. Inputs and outputs are float32, ids int64. Heights and widths of latents are multiples of what the denoiser
halves them by, or of its patches; FLUX reads latents as packed patches, with their places in img_ids.
"""


@options
class Triton(Target):
    """Models that a client runs in turn: text encoders, denoiser and vae_decoder.

    ``version`` is the number under which they are served: give every erased variant a new one. ``instances`` is where
    they run, "auto", "gpu" or "cpu". ``precision`` is that of text encoders and denoiser, "fp32" or "fp16". ``engines``
    "trt" builds TensorRT plans, for servers with the same version of TensorRT and the same kind of GPU.
    """

    version: Annotated[int, Field(ge=1)] = 1
    instances: Literal["auto", "gpu", "cpu"] = "auto"
    precision: Literal["fp32", "fp16"] = "fp32"
    engines: Literal["onnx", "trt"] = "onnx"

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "a model repository for Triton Inference Server"
    extras: ClassVar[frozenset[str]] = KINDS

    def __post_init__(self) -> None:
        if (self.engines, self.instances) == ("trt", "cpu"):
            raise ErasecError(
                "triton: plans of TensorRT do not run on a CPU", fix="choose instances=auto, or engines=onnx"
            )

    def unread_reason(self) -> str:
        return UNREAD if self.engines == "trt" else ""

    def check(self) -> None:
        require_modules("the target triton", ("onnx", "onnxruntime"), "onnx")
        if self.engines == "trt":
            Trt(precision=self.precision).check()

    def size(self, model: Model) -> int:
        """The graphs, and where plans are built from them, as much again.

        Raises ErasecError for a model that the graphs do not cover.
        """
        graphs(model.source)
        return int(super().size(model) * (0.5 if self.precision == "fp16" else 1) * (2 if self.engines == "trt" else 1))

    def cached(self, model: Model) -> int:
        return GRAPHS_BYTES

    def notes(self, model: Model) -> tuple[str, ...]:
        return sampling_notes(self.name, model.source)

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Link the graphs, write the repository and the client's folder, then check the files that the server loads.

        Raises ErasecError for a model that the graphs do not cover.
        """
        self.check()
        models = out / MODELS
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as scratch:
            linked = Folder(Path(scratch))
            exported = write_onnx(checkpoint, linked.root, self.precision, SERVED)
            checks = compare_weights(checkpoint, linked.root)
            ports = {graph.name: scalars_to_vectors(linked.root / graph.name / MODEL) for graph in exported}
            for name in linked.files():
                if not name.name.startswith("model.") and name.name != MANIFEST:
                    copy_file(linked.root / name, out / CLIENT / name)
            for graph in exported:
                version = models / graph.name / str(self.version)
                version.mkdir(parents=True, exist_ok=True)
                text = config(graph.name, *ports[graph.name], self.version, INSTANCES[self.instances], self.engines)
                (version.parent / CONFIG).write_text(text)
                for file in sorted((linked.root / graph.name).glob("model.*") if self.engines == "onnx" else ()):
                    file.replace(version / file.name)
            if self.engines == "trt":
                checks += self._build_plans(checkpoint, linked.root, out)
            else:
                checks += compare_outputs(checkpoint, models, exported, self.version, self.precision, context.seed)
            checks = repository_check(models, linked.root, [graph.name for graph in exported]), *checks
        (out / "README.md").write_text(readme(ports, self.version))
        return Artifact(self.name, out, checks)

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        require_modules("comparing graphs", ("onnx",), "onnx")
        with tempfile.TemporaryDirectory(dir=process_scratch()) as scratch:
            exported = write_onnx(checkpoint, Path(scratch), self.precision, SERVED)
            linked = {graph.name: Path(scratch) / graph.name / MODEL for graph in exported}
            ports = {name: scalars_to_vectors(file) for name, file in linked.items()}
            files = self._files_checks(checkpoint, Path(scratch), out, tuple(linked))
            if not all(check.passed for check in files):
                return files
            checks = [*files, self._configs_check(out / MODELS, ports)]
            for name, file in linked.items():
                served = Path(MODELS, name, str(self.version), ENGINES[self.engines][2])
                if self.engines == "onnx":
                    checks += compare_graph(name, file, out / served)
                else:
                    checks += enforced(engine_checks(out, name, file, served.as_posix()))
            return tuple(checks)

    def _files_checks(self, checkpoint: Folder, linked: Path, out: Path, names: Sequence[str]) -> tuple[Check, ...]:
        """Checks of the files in ``out``. No other version of a model may be there, which a server could be made to
        serve."""
        versions = [f"{MODELS}/{name}/{self.version}" for name in names]
        others = {"README.md", *(f"{MODELS}/{name}/{CONFIG}" for name in names)}
        others |= {f"{version}/{ENGINES[self.engines][2]}" for version in versions}
        others |= {engines.RECORD} if self.engines == "trt" else set()
        data = {f"{version}/{file}" for version in versions for file in (BASE, EDITED) if self.engines == "onnx"}
        return files_checks(self.name, checkpoint.root, linked, out, others, data, f"{CLIENT}/")

    def _configs_check(self, models: Path, ports: Mapping[str, tuple[Ports, Ports]]) -> Check:
        """Count the configurations that are not those of the graphs: they say which file the server loads."""
        wrong = []
        for name, (inputs, outputs) in ports.items():
            text = config(name, inputs, outputs, self.version, INSTANCES[self.instances], self.engines)
            if parse_config(read_text(models / name / CONFIG)) != parse_config(text):
                wrong.append(name)
        return Check.count("triton/configs", wrong, f"models whose {CONFIG} is not the one of their graph")

    def _build_plans(self, checkpoint: Folder, linked: Path, out: Path) -> tuple[Check, ...]:
        """Build the plans, and record them in engine.json. Their outputs are not compared with torch's."""
        target, entries, library = Trt(precision=self.precision), dict[str, dict[str, Any]](), ""
        profiles = target.profiles(checkpoint)
        with bar("build plans", len(profiles)) as advance:
            for name, profile in profiles.items():
                advance(0, name)
                file = out / MODELS / name / str(self.version) / ENGINES["trt"][2]
                entries[name], library = target.engine(linked / name / MODEL, file, profile)
                entries[name]["file"] = file.relative_to(out).as_posix()
                entries[name]["precision"] = "fp32" if name.startswith("vae") else self.precision
                advance()
        engines.write_record(out, target.builder(), library, entries)
        return tuple(check for name in profiles for check in engine_checks(out, name, linked / name / MODEL))


def scalars_to_vectors(file: Path) -> tuple[Ports, Ports]:
    """Replace scalar inputs of an ONNX file by vectors of one number; returns the file's inputs and outputs.

    Shapes in Triton have at least one axis. Its backend for plans, and its backend for ONNX before release 23.10,
    accept only the graph's own shapes.
    """
    import onnx

    model = onnx.load(file, load_external_data=False)
    scalars = [value.name for value in model.graph.input if not value.type.tensor_type.shape.dim]
    for scalar in scalars:
        inner = f"{scalar}/scalar"
        for node in model.graph.node:
            node.input[:] = [inner if name == scalar else name for name in node.input]
        model.graph.node.insert(0, onnx.helper.make_node("Squeeze", [scalar], [inner], name=f"/{inner}"))
        value = next(value for value in model.graph.input if value.name == scalar)
        value.type.tensor_type.shape.dim.add().dim_value = 1
    if scalars:
        file.write_bytes(model.SerializeToString(deterministic=True))
    return {value.name: _port(value) for value in model.graph.input}, {
        value.name: _port(value) for value in model.graph.output
    }


def _port(value: Any) -> Port:
    tensor = value.type.tensor_type
    return ELEMENTS[tensor.elem_type], tuple(-1 if dim.dim_param else dim.dim_value for dim in tensor.shape.dim)


def config(
    name: str,
    inputs: Ports,
    outputs: Ports,
    version: int,
    kind: str = "KIND_AUTO",
    engine: str = "onnx",
) -> str:
    """The text of a model's config.pbtxt.

    ``max_batch_size`` 0 means that shapes include the batch: the server batches requests only where every input has the
    batch as its first axis, and the timestep of a UNet has none. The version is named, so that no other version in the
    folder is served.
    """
    platform, backend, file = ENGINES[engine]
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f'backend: "{backend}"',
        f'default_model_filename: "{file}"',
        "max_batch_size: 0",
    ]
    for label, ports in (("input", inputs), ("output", outputs)):
        for port, (data_type, dims) in ports.items():
            shape = ", ".join(map(str, dims))
            lines.append(f'{label} {{\n  name: "{port}"\n  data_type: {data_type}\n  dims: [ {shape} ]\n}}')
    lines.append(f"instance_group {{\n  count: 1\n  kind: {kind}\n}}")
    lines.append(f"version_policy {{\n  specific {{\n    versions: [ {version} ]\n  }}\n}}")
    return "\n".join(lines) + "\n"


def parse_config(text: str) -> dict[str, list[Any]]:
    """A configuration, in the form that ``config`` writes, as lists of values by field; a message is a dict again.

    Raises ErasecError for a line that is not "field: value", "field {" or "}".
    """
    stack = [dict[str, list[Any]]()]
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if match := re.fullmatch(r"(\w+) \{", line):
            message = dict[str, list[Any]]()
            stack[-1].setdefault(match[1], []).append(message)
            stack.append(message)
        elif match := re.fullmatch(r'(\w+): ("[^"\\]*"|-?\d+|\[[-\d, ]*\])', line):
            stack[-1].setdefault(match[1], []).append(json.loads(match[2]))
        elif match := re.fullmatch(r"(\w+): ([A-Z]\w*)", line):
            stack[-1].setdefault(match[1], []).append(match[2])
        elif line == "}" and len(stack) > 1:
            stack.pop()
        else:
            raise ErasecError(f"{CONFIG} cannot be read", why=f"line {number} is {line!r}")
    if len(stack) > 1:
        raise ErasecError(f"{CONFIG} cannot be read", why="a message is not closed")
    return stack[0]


def repository_check(models: Path, graphs: Path, served: Sequence[str]) -> Check:
    """Count the faults that would keep Triton from serving a repository's models as intended, by its files.

    ``graphs`` is the folder of the linked graphs, and ``served`` are the names of all models.
    """
    wrong = [fault for folder in sorted(models.iterdir()) for fault in find_faults(folder, graphs, served)]
    wrong += [f"there is no {name}" for name in served if not (models / name).is_dir()]
    how = f"faults in {len(served)} configurations: files, names, types and shapes, against the graphs in "
    how += "onnxruntime"
    return Check.count("triton/repository", wrong, how)


def find_faults(folder: Path, graphs: Path, served: Sequence[str]) -> list[str]:
    """The faults of one folder of a repository, one sentence each; [] for a model that Triton can serve. ``served`` are
    the names of all models."""
    if folder.name not in served:
        return [f"Triton would load {folder.name} as a model"]
    try:
        fields = parse_config((folder / CONFIG).read_text())
        (version,) = fields["version_policy"][0]["specific"][0]["versions"][0]
        (file,), (backend,) = fields["default_model_filename"], fields["backend"]
        configured = [
            {port["name"][0]: (port["data_type"][0], tuple(port["dims"][0])) for port in fields[label]}
            for label in ("input", "output")
        ]
        engine = fields["platform"][0], backend, file
        name, batch = fields["name"][0], fields["max_batch_size"][0]
    except (ErasecError, OSError, KeyError, ValueError, TypeError) as error:
        return [f"{folder.name}: {CONFIG} is missing or damaged: {error!r}"]
    wrong, model = [], folder / str(version) / file
    if (name, batch) != (folder.name, 0) or engine not in ENGINES.values():
        wrong.append(f"{folder.name}: name, max_batch_size, platform, backend and file are {(name, batch, *engine)}")
    if not model.is_file():
        return [*wrong, f"{folder.name} has no {version}/{file}"]
    try:
        loaded = _loaded_ports(graphs / folder.name / MODEL if backend == "tensorrt" else model)
    except Exception as error:  # of any class; the server would fail with the same message
        return [*wrong, f"{folder.name}/{version}/{file} cannot be loaded: {str(error).splitlines()[0]}"]
    for label, expected, ports in zip(("input", "output"), configured, loaded, strict=True):
        wrong += [
            f"{folder.name}: {label} {port} is {expected.get(port)} in {CONFIG} and {ports.get(port)} in the model"
            for port in sorted(expected.keys() | ports.keys())
            if expected.get(port) != ports.get(port)
        ]
    return wrong


def _loaded_ports(file: Path) -> list[dict[str, Port]]:
    """Inputs and outputs as onnxruntime reports them for a loaded file; Triton's backend compares with the same."""
    import torch

    session = OnnxSession(file, torch.get_num_threads(), optimize=False).session
    return [
        {
            port.name: (TYPES.get(port.type, port.type), tuple(x if isinstance(x, int) else -1 for x in port.shape))
            for port in ports
        }
        for ports in (session.get_inputs(), session.get_outputs())
    ]


def compare_outputs(
    checkpoint: Folder, models: Path, exported: Sequence[Graph], version: int, precision: str = "fp32", seed: int = 0
) -> tuple[Check, ...]:
    """Run every model of a repository, with inputs of the shapes that it is served with, and compare it with torch."""
    import torch

    def load(graph: Graph) -> Component:
        return with_vectors(OnnxSession(models / graph.name / str(version) / MODEL, torch.get_num_threads()))

    precisions = {graph.name: "fp32" if graph.component == "vae" else precision for graph in exported}
    return parity.compare_outputs(checkpoint, models, precisions, seed=seed, load=load)


def readme(models: Mapping[str, tuple[Ports, Ports]], version: int) -> str:
    """The repository's README: how to serve it, and the inputs and outputs of each model."""
    rows = ""
    for name, ports in models.items():
        cells = ("; ".join(f"`{port}` {list(dims)}" for port, (_, dims) in values.items()) for values in ports)
        rows += f"| {name} | {' | '.join(cells)} |\n"
    return README.format(version=version, rows=rows)
