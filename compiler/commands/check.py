"""``erasec check``: is what was deployed still what was built, does it run here, and is it its checkpoint.

The base is not needed. Files are compared with what the build told of them, graphs are run once, and where the
checkpoint is at hand, weights and outputs are compared with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.base import Check, finite
from erasec.checkpoint.folder import Folder, variants
from erasec.checkpoint.safetensors import file_digest
from erasec.errors import CheckFailed, ErasecError, MissingTool
from erasec.graphs.graph import halvings
from erasec.graphs.link import MANIFEST, NAMES, read_manifest

if TYPE_CHECKING:
    from erasec.graphs.graph import Graph
    from erasec.graphs.parity import Run
    from erasec.runtime.backends import Component

    Array = NDArray[Any]
    Digests = Mapping[str, str]  # sha256 by a file's path in its folder

ENGINES, IR, WEIGHTS = "engine.json", "unet/openvino_model.xml", "model_index.json"
BACKENDS = {"onnx": "ort", "openvino": "openvino", "trt-rtx": "trt-rtx", "trt": "trt"}
LATENTS = 8
IR_TYPES = {b"u8": "int8", b"f16": "fp16"}


@dataclass(frozen=True)
class _Component:
    """One graph of a folder: how it is called here, which component it is, its file, and what loads it."""

    label: str
    name: str
    file: Path
    load: Callable[[], Component]


@dataclass(frozen=True)
class Found:
    """The checks that were made, and the libraries or devices without which others could not be."""

    checks: tuple[Check, ...]
    missing: tuple[MissingTool, ...]


def examine(folder: Path, against: Path | None = None) -> Found:
    """Check a build's folder, or that of one target; the names of checks begin with the target's.

    ``against`` is the checkpoint that all is compared with, by default the one in the build; without one nothing is.
    Raises ErasecError where there is nothing that can be checked.
    """
    folder, told = folder.resolve(), _report(folder)
    found = _kinds(folder, told)
    if not found:
        raise ErasecError(
            f"{folder} is no build and no target's folder", why="it has nothing that erasec checks", where=str(folder),
            fix="give what erasec build wrote; it needs the files that say what was written",
        )  # fmt: skip
    own = [root for root, kind in found.items() if kind == "checkpoint" and root != folder]
    place = against or next(iter(own), None)
    if place is not None and not (place / WEIGHTS).is_file():
        raise ErasecError(f"{place} is no checkpoint", why=f"it has no {WEIGHTS}", fix="give a diffusers folder")
    checks: list[Check] = []
    missing: list[MissingTool] = []
    for root, kind in found.items():
        name = kind if root == folder and kind != "checkpoint" else root.name
        for part, make in _parts(kind, root, told.get(root.name), _checkpoint(place) if place else None):
            try:
                for check in make():
                    checks.append(replace(check, name=f"{name}/{check.name}"))
            except MissingTool as error:
                missing.append(error)
            except ErasecError as error:
                how = ": ".join(filter(None, (error.what, error.why)))
                checks.append(Check(f"{name}/{part}", math.inf, 0.0, False, how))
    return Found(tuple(checks), tuple(missing))


def judge(found: Found, folder: Path) -> None:
    """Raise CheckFailed where a check failed, else MissingTool where one could not be made."""
    failed = [check for check in found.checks if not check.passed]
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(found.checks)} checks failed: {', '.join(check.name for check in failed)}",
            why=failed[0].how, where=str(folder), fix="fetch the folder or build it again; do not use this one",
        )  # fmt: skip
    if found.missing:
        raise found.missing[0]


def plain(check: Check) -> dict[str, Any]:
    """A check for JSON, which has no infinity: such a value is null."""
    return asdict(check) | {"value": check.value if math.isfinite(check.value) else None}


def _kinds(folder: Path, told: Mapping[str, Digests]) -> dict[Path, str]:
    """What ``folder`` is, or else what the folders in it are; those that only the report tells of are "files"."""
    if kind := _kind(folder):
        return {folder: kind}
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {path: kind for path in inside if (kind := _kind(path) or "files" * (path.name in told))}


def _checkpoint(root: Path) -> Folder:
    """A checkpoint as it was built: of the variant that its edited components were left with."""
    folder = Folder(root)
    found = [names for component in folder.index if (names := variants(root / component))]
    return replace(folder, variant=next((name for names in found for name in names if len(names) == 1 and name), ""))


def _kind(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return "onnx"
    if (folder / ENGINES).is_file():
        from erasec.tensorrt.engines import TARGETS, read_record

        try:
            return TARGETS[read_record(folder)["builder"]["name"]]
        except ErasecError:  # it is told as a check
            return "trt"
    if (folder / IR).is_file():
        return "openvino"
    if (folder / "models").is_dir() and (folder / "client" / WEIGHTS).is_file():
        return "triton"
    return "checkpoint" if (folder / WEIGHTS).is_file() else ""


def _report(folder: Path) -> dict[str, Digests]:
    """The digests that a build's report.json tells, by target; empty where there is no report."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {
            each["path"]: {name: file["sha256"] for name, file in each["files"].items()} for each in told["written"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(f"{path} is damaged", why=repr(error), fix="build it again") from error


def _parts(
    kind: str, root: Path, told: Digests | None, checkpoint: Folder | None
) -> Iterator[tuple[str, Callable[[], Iterable[Check]]]]:  # fmt: skip
    """What is checked of one folder, each with the name that it has where it cannot be done."""
    yield "files", lambda: _files(kind, root, told)
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
        yield "parity", lambda: _compared(kind, root, checkpoint)


def _files(kind: str, root: Path, told: Digests | None) -> Iterator[Check]:
    """Count the files that are not what the build wrote; no check where nothing tells what that was."""
    by, listed = "report.json", told
    if listed is None and kind == "onnx":
        by, listed = MANIFEST, dict(_manifest(root))
    elif listed is None and kind in ("trt", "trt-rtx"):
        from erasec.tensorrt.engines import read_record

        by, listed = ENGINES, {each["file"]: each["engine"] for each in read_record(root)["components"].values()}
    if listed is None:
        return
    here = {name.as_posix() for name in Folder(root).files()} - {by}
    gone, new = sorted(listed.keys() - here), sorted(here - listed.keys()) if by != ENGINES else []
    other = sorted(name for name in listed.keys() & here if file_digest(root / name) != listed[name])
    how = f"of {len(listed)} files that {by} tells of, sha256"
    for word, names in (("gone", gone), ("another file", other), ("not of the build", new)):
        how += f"; {names[0]} is {word}" if names else ""
    count = len(gone) + len(new) + len(other)
    yield Check("files", float(count), 0.0, not count, how)


def _manifest(root: Path) -> Iterator[tuple[str, str]]:
    told = read_manifest(root)
    for name, file in told["files"].items():
        yield name, file["sha256"]
    for graph, each in told["graphs"].items():
        for name, file in each["files"].items():
            yield f"{graph}/{name}", file["sha256"]


def _finite(folder: Folder) -> Iterator[Check]:
    for component in folder.index:
        if variants(folder.root / component):
            yield finite(f"finite/{component}", folder.entries(component))


def _same(root: Path, checkpoint: Path) -> Iterator[Check]:
    """Count the tensors and files of a checkpoint that are not those of another."""
    from erasec.commands.diff import compare

    found = compare(checkpoint, root)
    first = f"; the first is {found[0].key}" if found else ""
    yield Check("same", float(len(found)), 0.0, not found, f"tensors and files that are not that checkpoint's{first}")


def _source(root: Path, checkpoint: Folder) -> Iterator[Check]:
    """Whether engines were built from this checkpoint, which is linked once more: no GPU is needed."""
    from erasec.graphs.link import write
    from erasec.graphs.weights import digests
    from erasec.tensorrt.engines import read_record

    told = read_record(root)["components"]
    kinds = {name.startswith("vae"): each.get("precision", "fp32") for name, each in told.items()}
    with TemporaryDirectory(prefix="erasec-") as scratch:
        write(checkpoint, Path(scratch), kinds.get(False, "fp32"), tuple(told), vae=kinds.get(True, "fp32"))
        for name, each in told.items():
            other = digests(Path(scratch) / name / "model.onnx")[1] != each["weights"]
            how = f"whether {ENGINES} tells of other weights than the checkpoint's, sha256"
            yield Check(f"source/{name}", float(other), 0.0, not other, how)


def _here(kind: str, root: Path) -> Iterator[Check]:
    """Whether engines are for this machine; where they are, they are run."""
    from erasec.tensorrt.engines import check_runs_here, read_record

    check_runs_here(root)
    built = read_record(root)["builder"]
    yield Check("here", 0.0, 0.0, True, f"engines of {built['name']} {built['version']}, for this machine's GPU")
    yield from _run(kind, root)


def _components(kind: str, root: Path) -> Iterator[_Component]:
    from erasec.runtime.backends import FILES, Graphs, onnx_runtime

    for name in NAMES:
        if kind == "triton":
            for file in sorted((root / "models" / name).glob("*/model.onnx")):
                yield _Component(f"{name}/{file.parent.name}", name, file, partial(onnx_runtime, file, None))
            continue
        file = root / name / FILES[BACKENDS[kind]]
        if name != "vae_encoder" or file.is_file():
            yield _Component(name, name, file, partial(Graphs(root, BACKENDS[kind], None).open, name))


def _run(kind: str, root: Path) -> Iterator[Check]:
    """Run each graph once on a small input; count the outputs that are not finite."""
    for each in _components(kind, root):
        try:
            given = inputs(kind, root, each.name)
            with closing(each.load()) as component:
                outputs = component.run(given)
        except MissingTool:
            raise
        except Exception as error:  # each library has its own kinds
            first = next(iter(str(getattr(error, "why", "") or error).splitlines()), type(error).__name__)
            how = f"it cannot be run: {first.replace(str(root), '.')}"
            yield Check(f"finite/{each.label}", math.inf, 0.0, False, how)
            continue
        bad = [key for key, value in outputs.items() if not np.isfinite(value).all()]
        sizes = ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in given.items())
        how = f"outputs with a NaN or an infinity, of {sizes}" + (f"; {bad[0]} has" if bad else "")
        yield Check(f"finite/{each.label}", float(len(bad)), 0.0, not bad and bool(outputs), how)


def inputs(kind: str, root: Path, name: str) -> dict[str, Array]:
    """A small seeded input of the component ``name``: of engines the least that they take."""
    home = root / "client" if kind == "triton" else root
    text, unet, vae = (Folder(home).config(each) for each in ("text_encoder", "unet", "vae_decoder"))
    length, draw = text["max_position_embeddings"], np.random.default_rng(0)
    step, scale = halvings(unet), halvings(vae)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "text_encoder": {"input_ids": (1, length)},
        "unet": {
            "sample": (1, unet["in_channels"], 2 * step, 2 * step),
            "encoder_hidden_states": (1, length, unet["cross_attention_dim"]),
        },
        "vae_decoder": {"latent_sample": (1, vae["latent_channels"], LATENTS, LATENTS)},
        "vae_encoder": {"sample": (1, vae["in_channels"], LATENTS * scale, LATENTS * scale)},
    }
    wanted = shapes[name]
    if kind in ("trt", "trt-rtx"):
        from erasec.tensorrt.engines import read_record

        wanted = {key: tuple(each["min"]) for key, each in read_record(root)["components"][name]["profile"].items()}
    given: dict[str, Array] = {
        key: np.arange(math.prod(shape)).reshape(shape) % text["vocab_size"] if key == "input_ids"
        else draw.standard_normal(shape, np.float32) for key, shape in wanted.items()
    }  # fmt: skip
    if name == "unet":
        given["timestep"] = np.array([500] if kind == "triton" else 500, np.float32)
    return given


def _compared(kind: str, root: Path, checkpoint: Folder) -> Iterator[Check]:
    """Weights and outputs against the checkpoint, as the target itself compares them when it is built."""
    from erasec.graphs.graph import graphs
    from erasec.graphs.parity import TOLERANCES, compared, parity, tensors

    if kind == "onnx":
        yield from tensors(checkpoint, root)
        yield from parity(checkpoint, root)
        return
    every = {graph.name: graph for graph in graphs(checkpoint)}
    for each in _components(kind, root):
        precision = _stored(each.file)
        run = _caller(kind, each, every[each.name])
        check = compared(checkpoint, every[each.name], root, precision, 0, TOLERANCES[precision], run, kind)
        yield replace(check, name=f"parity/{each.label}")


def _caller(kind: str, component: _Component, graph: Graph) -> Run:
    opened = cache(component.load)  # when it is first run, so that what fails then is told by the check

    def run(name: str, given: Mapping[str, Any]) -> list[Array]:
        arrays = {key: np.atleast_1d(value) if kind == "triton" else np.asarray(value) for key, value in given.items()}
        outputs = opened().run(arrays)
        return [outputs[key] for key in graph.outputs]

    return run


def _stored(file: Path) -> str:
    """How the coarsest weights of an ONNX file or of IR are stored, as outputs can be no nearer than these."""
    if file.suffix == ".xml":
        text = file.read_bytes()
        return next((name for kind, name in IR_TYPES.items() if b'element_type="%b"' % kind in text), "fp32")
    import onnx

    weights = onnx.load(file, load_external_data=False).graph.initializer
    return "fp16" if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights) else "fp32"
