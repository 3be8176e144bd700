"""``erasec check``: checks that a built folder is unchanged, runs on this machine, and agrees with its checkpoint.

All files below the folder that has the manifest are compared with it, wherever below it the check starts. Each graph is
run once. If the checkpoint is available, weights and outputs are compared with it. The base model is not needed. A
folder without a manifest, as erasec 0.1.0 left it, is compared with the digests in its report or in its own record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec import registry
from erasec.base import Check
from erasec.checkpoint import manifest
from erasec.checkpoint.folder import Folder, downscale, only_variant, variants
from erasec.checkpoint.owned import process_scratch
from erasec.checkpoint.safetensors import file_digest, finite_check
from erasec.commands.integrity import compare_with_manifest, listed, outcome_notes, recorded_digests, sealed_check
from erasec.errors import CheckFailed, ErasecError, MissingTool
from erasec.graphs.conditioning import picture_inputs
from erasec.graphs.manifest import MANIFEST, file_records, read_manifest
from erasec.graphs.signature import NAMES, TEXT_STATES, configs, graphs, input_shapes, layout
from erasec.reporting.read import REPORT
from erasec.runtime.backends import GraphComponents, GraphRuntime, OnnxRuntime, with_vectors

if TYPE_CHECKING:
    from erasec.graphs.signature import Graph
    from erasec.runtime.backends import Component

    Array = NDArray[Any]
    Digests = Mapping[str, str]  # the sha256 of each file, by its path in the folder

ENGINES, WEIGHTS = "engine.json", "model_index.json"
LATENT_SIDE = 8
# Targets whose folders are known by a manifest or a record, not by their graphs alone.
RECORDED = frozenset(("onnx", "trt", "trt-rtx"))
# The element types of OpenVINO's IR, coarsest first.
IR_TYPES = {b"u8": "int8", b"f16": "fp16"}


@dataclass(frozen=True)
class _Component:
    """One graph of a folder. ``label`` names it in checks, ``name`` is its component, ``load`` opens it."""

    label: str
    name: str
    file: Path
    load: Callable[[], Component]


@dataclass(frozen=True)
class Examination:
    """The checks of a folder, the libraries or devices that are missing for further checks, and notes for the user."""

    checks: tuple[Check, ...]
    missing: tuple[MissingTool, ...] = ()
    notes: tuple[str, ...] = ()


def examine(folder: Path, against: Path | None = None) -> Examination:
    """Check the output folder of a build, a folder or a file in it, or a single file that erasec wrote. Names of checks
    begin with the target's name.

    ``against`` is the checkpoint that everything is compared with, by default the one in the build. If there is none,
    no comparison is made. What differs from the manifest is not run. Raises ErasecError if ``folder`` holds nothing
    that can be checked.
    """
    folder, root = folder.resolve(), manifest.find(folder)
    if root is not None:
        checks, differences = compare_with_manifest(root)
        if differences is None or folder.is_file():
            return Examination(checks)
        same = {
            path: kind
            for path, kind in _kinds(folder, {}).items()
            if not differences.below(path.relative_to(root).as_posix())
        }
        rest = _examine_folders(folder, same, {}, against, compared=True)
        return replace(rest, checks=(*checks, *rest.checks), notes=outcome_notes(root))
    if folder.is_file():
        return Examination((sealed_check(folder),))
    recorded = recorded_digests(folder)
    note = (
        f"{folder} has no {manifest.FILE}, and no folder above it has one, as erasec 0.1.0 left it: "
        "only files that a report or a record lists are compared"
    )
    rest = _examine_folders(folder, _kinds(folder, recorded), recorded, against)
    return replace(rest, notes=(note,))


def _examine_folders(
    folder: Path,
    folders: Mapping[Path, str],
    recorded: Mapping[str, Digests],
    against: Path | None,
    compared: bool = False,
) -> Examination:
    """Check ``folders``, by their paths their kinds, which are ``folder`` itself or in it. With ``compared``, their
    files were compared with a manifest already."""
    if not folders and not compared:
        raise ErasecError(
            f"{folder} is no build and no target's folder",
            why="it holds no manifest, record or model that erasec can check, and no folder above it has a manifest",
            where=str(folder),
            fix="give a folder that erasec build wrote",
        )
    checkpoints = [root for root, kind in folders.items() if kind == "checkpoint" and root != folder]
    reference = against or next(iter(checkpoints), None)
    if reference is not None and not (reference / WEIGHTS).is_file():
        raise ErasecError(f"{reference} is no checkpoint", why=f"it has no {WEIGHTS}", fix="give a diffusers folder")
    checkpoint = None
    if reference is not None:
        try:
            checkpoint = _checkpoint(reference)
        except ErasecError:
            if reference not in folders:  # otherwise its own checks fail
                raise
    checks: list[Check] = []
    missing: list[MissingTool] = []
    for root, kind in folders.items():
        target = kind if root == folder and kind != "checkpoint" else root.name
        steps = _steps(kind, root, recorded.get(root.name), checkpoint)
        for name, run in steps:
            if compared and name == "files":
                continue
            try:
                for check in run():
                    checks.append(replace(check, name=f"{target}/{check.name}"))
            except MissingTool as error:
                missing.append(error)
            except ErasecError as error:
                how = ": ".join(filter(None, (error.what, error.why)))
                checks.append(Check(f"{target}/{name}", math.inf, 0.0, False, how))
    return Examination(tuple(checks), tuple(missing))


def raise_for_failures(examination: Examination, folder: Path) -> None:
    """Raise CheckFailed if a check failed; otherwise MissingTool if a check could not be made."""
    failed = [check for check in examination.checks if not check.passed]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(examination.checks)} checks failed: {', '.join(check.name for check in failed)}",
            why=failed[0].how,
            where=str(folder),
            fix="fetch the folder again or build it again; do not use this one",
        )
    if examination.missing:
        raise examination.missing[0]


def check_as_json(check: Check) -> dict[str, Any]:
    """A check as plain data for JSON. JSON has no infinity: a value that is not finite becomes None."""
    return asdict(check) | {"value": check.value if math.isfinite(check.value) else None}


def _kinds(folder: Path, recorded: Mapping[str, Digests]) -> dict[Path, str]:
    """The kind of ``folder``, or of each folder in it. "files" is a folder that only the report of the build lists."""
    if kind := _kind(folder):
        return {folder: kind}
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {path: kind for path in inside if (kind := _kind(path) or "files" * (path.name in recorded))}


def _checkpoint(root: Path) -> Folder:
    """The checkpoint in ``root``, with the variant of its edited components: those that exist in one variant only."""
    return Folder(root, only_variant(root))


def _kind(folder: Path) -> str:
    """What a folder is: a target's name, "checkpoint", or "" for anything else."""
    if (folder / MANIFEST).is_file():
        return "onnx"
    if (folder / ENGINES).is_file():
        from erasec.tensorrt.engines import TARGETS, read_record

        try:
            return TARGETS[read_record(folder)["builder"]["name"]]
        except ErasecError:  # a damaged record becomes a failed check later
            return "trt"
    for runtime in _graph_runtimes():
        if not RECORDED.intersection(runtime.folders) and runtime.runs(folder):
            return runtime.folders[0]
    if (folder / "models").is_dir() and (folder / "client" / WEIGHTS).is_file():
        return "triton"
    return "checkpoint" if (folder / WEIGHTS).is_file() else ""


def _graph_runtimes() -> list[type[GraphRuntime]]:
    """The registered runtimes that run one graph for each component."""
    runtimes = (registry.load_runtime(name) for name in registry.runtimes())
    return [runtime for runtime in runtimes if issubclass(runtime, GraphRuntime)]


def _steps(
    kind: str, root: Path, recorded: Digests | None, checkpoint: Folder | None
) -> Iterator[tuple[str, Callable[[], Iterable[Check]]]]:
    """The steps that check one folder. Each has the name of the check that fails if the step raises an error."""
    yield "files", lambda: _files(kind, root, recorded)
    if kind == "files":
        return
    if kind == "checkpoint":
        yield "finite", lambda: _finite(_checkpoint(root))
        if checkpoint is not None and checkpoint.root.resolve() != root:
            yield "same", lambda: _same(root, checkpoint.root)
        return
    if kind in ("trt", "trt-rtx"):
        if checkpoint is not None:
            yield "source", lambda: _source(root, checkpoint)
        yield "here", lambda: _here(kind, root)
        return
    yield "run", lambda: _run(kind, root)
    if checkpoint is not None:
        yield "parity", lambda: _parity(kind, root, checkpoint)


def _files(kind: str, root: Path, recorded: Digests | None) -> Iterator[Check]:
    """Count the files that differ from those that the build wrote. No check if no digests were recorded."""
    record, digests = REPORT, recorded
    if digests is None and kind == "onnx":
        records = file_records(read_manifest(root))
        record, digests = MANIFEST, {name: file.sha256 for name, file in records.items()}
    elif digests is None and kind in ("trt", "trt-rtx"):
        from erasec.tensorrt.engines import read_record

        components = read_record(root)["components"].values()
        record, digests = ENGINES, {component["file"]: component["engine"] for component in components}
    if digests is None:
        return
    present = {name.as_posix() for name in Folder(root).files()} - {record}
    lost = sorted(digests.keys() - present)
    added = sorted(present - digests.keys()) if record != ENGINES else []
    changed = sorted(name for name in digests.keys() & present if file_digest(root / name) != digests[name])
    how = f"files that differ from the {len(digests)} listed in {record}, by sha256"
    how += listed({"lost": lost, "changed": changed, "added": added})
    yield Check.at_most("files", float(len(lost) + len(added) + len(changed)), 0.0, how)


def _finite(folder: Folder) -> Iterator[Check]:
    for component in folder.index:
        if variants(folder.root / component):
            yield finite_check(f"finite/{component}", folder.entries(component))


def _same(root: Path, checkpoint: Path) -> Iterator[Check]:
    """Count the tensors and files in which a checkpoint differs from another."""
    from erasec.commands.diff import compare

    differences = [difference.key for difference in compare(checkpoint, root)]
    yield Check.count("same", differences, "tensors and files that differ from the given checkpoint")


def _source(root: Path, checkpoint: Folder) -> Iterator[Check]:
    """Check that engines were built from this checkpoint, by linking its graphs again. Needs no GPU."""
    from erasec.graphs.link import write_onnx
    from erasec.graphs.weights import digests
    from erasec.tensorrt.engines import read_record

    components = read_record(root)["components"]
    precisions = {name.startswith("vae"): entry.get("precision", "fp32") for name, entry in components.items()}
    precision, vae_precision = precisions.get(False, "fp32"), precisions.get(True, "fp32")
    with TemporaryDirectory(dir=process_scratch()) as scratch:
        write_onnx(checkpoint, Path(scratch), precision, tuple(components), vae=vae_precision)
        for name, entry in components.items():
            differs = digests(Path(scratch) / name / "model.onnx")[1] != entry["weights"]
            how = f"1 if {ENGINES} records other weights than those of the checkpoint, by sha256"
            yield Check.at_most(f"source/{name}", float(differs), 0.0, how)


def _here(kind: str, root: Path) -> Iterator[Check]:
    """Check that engines are built for this machine's GPU, and run them."""
    from erasec.tensorrt.engines import check_runs_here, read_record

    check_runs_here(root)
    builder = read_record(root)["builder"]
    how = f"engines built by {builder['name']} {builder['version']} for this machine's GPU"
    yield Check.at_most("here", 0.0, 0.0, how)
    yield from _run(kind, root)


def _components(kind: str, root: Path) -> Iterator[_Component]:
    if kind == "triton":
        for name in NAMES:
            for file in sorted((root / "models" / name).glob("*/model.onnx")):
                yield _Component(f"{name}/{file.parent.name}", name, file, partial(OnnxRuntime.load, file, None))
        return
    runtime = next(runtime for runtime in _graph_runtimes() if kind in runtime.folders)
    components = GraphComponents(root, runtime)
    needed = {graph.name for graph in graphs(Folder(root))} - {"vae_encoder"}
    for name in NAMES:
        file = root / name / runtime.file
        if name in needed or file.is_file():
            yield _Component(name, name, file, partial(components.open, name))


def _run(kind: str, root: Path) -> Iterator[Check]:
    """Run each graph once on small inputs; count the outputs that are not finite."""
    for graph in _components(kind, root):
        try:
            inputs = small_inputs(kind, root, graph.name)
            with closing(graph.load()) as component:
                outputs = component.run(inputs)
        except MissingTool:
            raise
        except Exception as error:  # each library raises its own types of errors
            first_line = next(iter(str(getattr(error, "why", "") or error).splitlines()), type(error).__name__)
            how = f"the graph cannot be run: {first_line.replace(str(root), '.')}"
            yield Check(f"finite/{graph.label}", math.inf, 0.0, False, how)
            continue
        bad = [key for key, value in outputs.items() if not np.isfinite(value).all()]
        sizes = ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in inputs.items())
        how = f"outputs with NaN or infinity, for inputs {sizes}" + (f"; the first is {bad[0]}" if bad else "")
        yield Check(f"finite/{graph.label}", float(len(bad)), 0.0, not bad and bool(outputs), how)


def small_inputs(kind: str, root: Path, name: str) -> dict[str, Array]:
    """Small seeded inputs of the component ``name``, by input name. For engines the smallest shapes of the profile."""
    folder = Folder(root / "client" if kind == "triton" else root)
    graph, by_component = next(graph for graph in graphs(folder) if graph.name == name), configs(folder)
    side = 2 * downscale(by_component[graph.component]) if graph.denoises else LATENT_SIDE
    shapes = input_shapes(graph, by_component, 1, side, side)
    if kind in ("trt", "trt-rtx"):
        from erasec.tensorrt.engines import read_record

        profile = read_record(root)["components"][name]["profile"]
        shapes |= {key: tuple(bounds["min"]) for key, bounds in profile.items()}
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {
        key: np.arange(math.prod(shape)).reshape(shape) % by_component[graph.component]["vocab_size"]
        if key == "input_ids"
        else rng.standard_normal(shape, np.float32)
        for key, shape in shapes.items()
    }
    if graph.denoises:
        described = picture_inputs(layout(folder), by_component, (1, side, side), inputs[TEXT_STATES].shape[1])
        inputs |= {key: np.resize(value, shapes[key]) for key, value in described.items()}
        timestep = np.full(shapes["timestep"], 0.5 if "img_ids" in inputs else 500, np.float32)
        inputs["timestep"] = np.atleast_1d(timestep) if kind == "triton" else timestep
    return inputs


def _parity(kind: str, root: Path, checkpoint: Folder) -> Iterator[Check]:
    """Compare weights and outputs with the checkpoint, with the tolerances of a build."""
    from erasec.graphs.parity import TOLERANCES, compare_graph, compare_outputs, compare_weights

    if kind == "onnx":
        yield from compare_weights(checkpoint, root)
        yield from compare_outputs(checkpoint, root)
        return
    by_name = {graph.name: graph for graph in graphs(checkpoint)}
    for component in _components(kind, root):
        graph, precision = by_name[component.name], weight_precision(component.file)
        load = _loader(component, vectors=kind == "triton")
        check = compare_graph(checkpoint, graph, root, precision, 0, TOLERANCES[precision], load, kind)
        yield replace(check, name=f"parity/{component.label}")


def _loader(component: _Component, vectors: bool) -> Callable[[Graph], Component]:
    """Opens ``component`` for any graph; with ``vectors``, its scalar inputs are vectors of one number."""
    return lambda _: with_vectors(component.load()) if vectors else component.load()


def weight_precision(file: Path) -> str:
    """The precision of the coarsest weights in an ONNX or IR file; it limits how closely outputs can agree.

    A file of another format counts as fp32, the strictest.
    """
    if file.suffix == ".xml":
        text = file.read_bytes()
        return next((name for ir_type, name in IR_TYPES.items() if b'element_type="%b"' % ir_type in text), "fp32")
    if file.suffix != ".onnx":
        return "fp32"
    import onnx

    weights = onnx.load(file, load_external_data=False).graph.initializer
    return "fp16" if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights) else "fp32"
