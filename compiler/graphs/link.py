"""The linker: joins weightless graphs and a checkpoint's tensors to an ONNX folder, without torch and without tracing.

Weights are external data in two files. model.onnx_data holds the tensors that the checkpoint shares with the base that
it is a variant of, and model.edited.onnx_data those that the variant replaces. So two variants of one base differ in
the second, small file only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint.safetensors import Entry, atomic_write, copy_file, file_digest, hard_link, read_bytes
from erasec.errors import ErasecError
from erasec.graphs.graph import EMBEDDING, MEMORY, MODEL, Template, Weight, weight_from_json
from erasec.graphs.manifest import read_manifest, write_manifest
from erasec.graphs.signature import COPIED, NAMES, T5, Graph, graphs, with_whole_prompts
from erasec.ldm.tensor_names import TIED, canonical
from erasec.model.sidecar import Extras, read_extras
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.graphs.manifest import Origin

BASE, EDITED = "model.onnx_data", "model.edited.onnx_data"
OPSET = 18
# Norms sum squares, which can exceed the range of float16; computing them in float32 costs little.
KEEP_IN_FP32 = ("*norm*",)
# Keys that old configs lack, with diffusers' defaults: pipelines guess these values wrongly, or warn.
DEFAULTS: dict[str, dict[str, Any]] = {"unet": {"time_cond_proj_dim": None}, "vae": {"scaling_factor": 0.18215}}
PAGE = 4096  # every tensor begins on a page, so that readers can map it into memory
NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

Array = NDArray[Any]
Read = Callable[[Weight], Array]


def link(
    template: Template,
    component: str,
    entries: Mapping[str, Entry],
    folder: Path,
    replaced: Iterable[str] = (),
    extras: Extras | None = None,
    share: Path | None = None,
) -> dict[str, Any]:
    """Write ``folder``/model.onnx and its data: the tensors of ``entries`` as the template lays them out.

    Tensors whose key is in ``replaced``, and those that hold ``extras``, go to model.edited.onnx_data. ``share`` is a
    folder of the same graph that was linked from the same base: its model.onnx_data is hard-linked instead of written.
    One tensor is in memory at a time.

    Returns the graph's part of the manifest. Raises ErasecError where a tensor is missing or of another shape, or the
    shared file differs from the one that would be written.
    """
    keys = _stored_keys(component, template.weights, entries)
    read = _weight_reader(keys, entries, extras, template.weights)
    replaced_keys = set(replaced)
    edited = [
        weight for weight in template.weights if _holds_extras(weight, extras) or keys[weight.key] in replaced_keys
    ]
    common = [weight for weight in template.weights if weight not in edited]

    folder.mkdir(parents=True, exist_ok=True)
    locations, files = dict[str, tuple[str, int, int]](), dict[str, Any]()
    for name, weights in ((BASE, common), (EDITED, edited)):
        spans = _spans(weights)
        locations |= {weight.name: (name, *span) for weight, span in zip(weights, spans, strict=True)}
        if not weights:
            continue
        if name == BASE and share is not None:
            files[name] = _link_shared(share / BASE, folder / BASE, _end(spans))
        else:
            files[name] = write_data(folder / name, weights, lambda weight: read(weight.name))
    model = template.load()
    for tensor in model.graph.initializer:
        for key, value in zip(("location", "offset", "length"), locations[tensor.name], strict=True):
            tensor.external_data.add(key=key, value=str(value))
    content = model.SerializeToString(deterministic=True)
    with atomic_write(folder / MODEL) as temporary:
        temporary.write_bytes(content)
    files[MODEL] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "graph": template.key,
        "files": files,
        "weights": [asdict(weight) for weight in template.weights],
        "edited": [asdict(weight) | {"key": keys.get(weight.key, weight.key)} for weight in edited],
    }


def _weight_reader(
    keys: Mapping[str, str], entries: Mapping[str, Entry], extras: Extras | None, weights: Sequence[Weight]
) -> Callable[[str], Array]:
    """A function that reads a weight of a graph by its name. ``keys`` are the checkpoint's keys by parameter."""
    by_name = {weight.name: weight for weight in weights}

    def read(name: str) -> Array:
        weight = by_name[name]
        if _is_memory(weight):
            return _memory(weight, extras)
        new_rows = extras.tokens if extras and weight.key.endswith(EMBEDDING) else {}
        return lay_out(read_array(entries[keys[weight.key]]), weight, list(new_rows.values()))

    return read


def write_data(path: Path, weights: Sequence[Weight], read: Read) -> dict[str, Any]:
    """Write tensors one after the other, each at the start of a page. Returns the file's size in bytes and sha256."""
    digest, size = hashlib.sha256(), 0
    spans = _spans(weights)
    with atomic_write(path, total=_end(spans)) as temporary, temporary.open("r+b") as file:
        for weight, (offset, length) in zip(weights, spans, strict=True):
            content = read(weight)
            if content.nbytes != length:
                raise ErasecError(f"{weight.key} has {content.nbytes} bytes, and its graph reads {length}")
            data = content.reshape(-1).view(np.uint8).data
            for part in (bytes(offset - size), data):
                digest.update(part)
                file.write(part)
            size = offset + length
    return {"bytes": size, "sha256": digest.hexdigest()}


def _spans(weights: Sequence[Weight]) -> list[tuple[int, int]]:
    """Offset and length in bytes of each tensor in its data file."""
    spans, offset = [], 0
    for weight in weights:
        offset += -offset % PAGE
        length = int(np.prod(weight.shape, dtype=np.int64)) * np.dtype(weight.dtype).itemsize
        spans.append((offset, length))
        offset += length
    return spans


def _end(spans: Sequence[tuple[int, int]]) -> int:
    """The size in bytes of a data file with these spans."""
    return sum(spans[-1]) if spans else 0


def _is_memory(weight: Weight) -> bool:
    return weight.key.startswith(MEMORY)


def _holds_extras(weight: Weight, extras: Extras | None) -> bool:
    """Whether a tensor holds ``extras``: a memory, or the token embedding with rows for new tokens."""
    return _is_memory(weight) or bool(extras and extras.tokens and weight.key.endswith(EMBEDDING))


def _memory(weight: Weight, extras: Extras | None) -> Array:
    number, part = weight.key.removeprefix(f"{MEMORY}_").split("_")
    assert extras is not None  # the template was traced with these extras
    rows = getattr(extras.memories[int(number)], part).float().numpy()
    return lay_out(rows, weight)


def lay_out(stored: Array, weight: Weight, new_rows: Sequence[Any] = ()) -> Array:
    """A checkpoint's tensor as its graph holds it: ``new_rows`` (d) appended, axes permuted, reshaped, cast.

    Raises ErasecError where its shape is not the one that the graph was traced with, or a number exceeds float16.
    """
    if new_rows:
        stored = np.concatenate([stored, *(row.float().numpy()[None] for row in new_rows)])
    if stored.shape != weight.source:
        raise ErasecError(
            f"{weight.key} has the shape {stored.shape}",
            why=f"the model's configuration gives it the shape {weight.source}",
            fix="the config.json beside the weights belongs to another model: fetch the folder again",
        )
    permuted = stored.transpose(weight.axes).reshape(weight.shape)
    with np.errstate(over="ignore"):
        array: Array = np.ascontiguousarray(permuted, dtype=weight.dtype)
    if weight.dtype == "float16" and not np.isfinite(array).all() and np.isfinite(stored).all():
        raise ErasecError(
            f"{weight.key} does not fit into float16",
            why=f"its largest number is {np.abs(stored).max():g}",
            fix="keep its module in float32: keep_in_fp32=...",
        )
    return array


def read_array(entry: Entry) -> Array:
    """One tensor of a safetensors file, bfloat16 widened to float32."""
    data = read_bytes(entry)
    if entry.dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif entry.dtype in NUMPY:
        flat = np.frombuffer(data, NUMPY[entry.dtype])
    else:
        raise ErasecError(
            f"a weight is stored as {entry.dtype}",
            why=f"the linker reads {', '.join(NUMPY)} and BF16",
            where=str(entry.file),
            fix="save the checkpoint in one of these dtypes",
        )
    return flat.reshape(entry.shape[::-1]).T if entry.transposed else flat.reshape(entry.shape)


def _stored_keys(component: str, weights: Sequence[Weight], entries: Mapping[str, Entry]) -> dict[str, str]:
    """The checkpoint's key of each parameter. Raises ErasecError where one is missing."""
    stored = {canonical(component, key): key for key in entries}
    keys = {}
    for weight in weights:
        if _is_memory(weight):
            continue
        name = canonical(component, weight.key)
        if name not in stored and weight.key in TIED:
            name = canonical(component, TIED[1 - TIED.index(weight.key)])
        if name not in stored:
            raise ErasecError(
                f"the checkpoint has no {weight.key}",
                why="its graph reads this tensor, and random numbers would take its place",
                where=str(next(iter(entries.values())).file.parent) if entries else "",
                fix="fetch the model again",
            )
        keys[weight.key] = stored[name]
    return keys


def _link_shared(source: Path, target: Path, size: int) -> dict[str, Any]:
    """Hard-link another folder's data file; returns its part of that folder's manifest.

    Raises ErasecError where the file is not of ``size`` bytes.
    """
    file = read_manifest(source.parent.parent)["graphs"][source.parent.name]["files"].get(BASE)
    if file is None or not source.is_file() or source.stat().st_size != size or file["bytes"] != size:
        raise ErasecError(
            f"{source} cannot be shared",
            why="it is not as large as the file that this model would write",
            fix="share a folder that was built from the same base, with edits of the same tensors",
        )
    hard_link(source, target)
    return dict(file)


def write_onnx(
    checkpoint: Folder,
    out: Path,
    precision: str = "fp32",
    names: Sequence[str] = NAMES,
    *,
    vae: str = "fp32",
    keep_in_fp32: Sequence[str] = KEEP_IN_FP32,
    opset: int = OPSET,
    origin: Origin | None = None,
    share: Path | None = None,
) -> tuple[Graph, ...]:
    """Write the ONNX folder of a checkpoint, in the layout of optimum's pipelines; returns its graphs.

    ``names`` are the graphs to write. Text encoders and denoiser have ``precision``, the VAE has the precision
    ``vae``; inputs and outputs are always float32. ``keep_in_fp32`` are patterns of names of modules that compute in
    float32 within a float16 graph. Memories, new tokens and a negative prompt of the checkpoint become part of the
    graphs. With an ``origin``, tensors that differ from it go to a file of their own, and ``share`` may be an ONNX
    folder of the same origin whose other data are hard-linked. Raises ErasecError for a model that the graphs do not
    cover.
    """
    from erasec.graphs.export import graph_template, negative_ids  # imports torch, which only tracing needs

    selected = [graph for graph in graphs(checkpoint) if graph.name in names]
    extras = read_extras(checkpoint.root)
    for name in checkpoint.files():
        if name.parts[0] in COPIED or name.as_posix() == "model_index.json":
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(checkpoint.root / name, out / name)
    negative = negative_ids(checkpoint, extras, out)
    manifest: dict[str, Any] = {"precision": precision, "vae": vae, "graphs": {}, "carried": sorted(extras.kinds)}
    manifest["base"] = dict(origin.tensors) if origin else {}
    prepared = []
    with bar("graphs", len(selected)) as advance:
        for graph in selected:
            advance(0, graph.name)
            if negative and graph.name == "text_encoder":
                graph = with_whole_prompts(graph)
            graph_precision = vae if graph.component == "vae" else precision
            template = graph_template(
                checkpoint,
                graph,
                graph_precision,
                opset,
                fp32_modules(checkpoint, graph, keep_in_fp32),
                extras,
                negative if graph.name == "text_encoder" else (),
            )
            prepared.append((graph, graph_precision, template))
            advance()
    _check_patterns(keep_in_fp32, [template for _, kind, template in prepared if kind == "fp16"])
    with bar("link onnx", len(selected)) as advance:
        for graph, graph_precision, template in prepared:
            advance(0, graph.name)
            folder = out / graph.name
            folder.mkdir(parents=True, exist_ok=True)
            config = DEFAULTS.get(graph.component, {}) | checkpoint.config(graph.component)
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            origin_digest = _origin_digest(origin, graph.component)
            if share is not None:
                _check_shared(share, graph.name, template.key, origin_digest)
            manifest["graphs"][graph.name] = {
                "component": graph.component,
                "precision": graph_precision,
                "origin": origin_digest,
            } | link(
                template,
                graph.component,
                checkpoint.entries(graph.component),
                folder,
                origin.replaced(graph.component) if origin else (),
                extras,
                share / graph.name if share is not None else None,
            )
            advance()
    linked = {path for graph, *_ in prepared for path in (out / graph.name).glob("model.*")}
    others = (path for path in sorted(out.rglob("*")) if path.is_file() and path not in linked)
    manifest["files"] = {
        path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in others
    }
    write_manifest(out, manifest)
    return tuple(graph for graph, *_ in prepared)


def fp32_modules(checkpoint: Folder, graph: Graph, keep_in_fp32: Sequence[str]) -> tuple[str, ...]:
    """``keep_in_fp32``, and what overflows float16: the last matrix of each layer of T5, and attention where the config
    says so, as in Stable Diffusion 2.1."""
    upcast = graph.name == "unet" and checkpoint.config("unet").get("upcast_attention")
    more = ("*.wo",) if graph.kind == T5 else ("*.attn1", "*.attn2") if upcast else ()
    return *keep_in_fp32, *more


def _check_patterns(keep_in_fp32: Sequence[str], templates: Sequence[Template]) -> None:
    """Raise ErasecError for a pattern that matches no module with weights in any of these float16 graphs."""
    keys = {weight.key for template in templates for weight in template.weights}
    modules = {key[:end] for key in keys for end, letter in enumerate(key) if letter == "."}
    unmatched = [pattern for pattern in keep_in_fp32 if not any(fnmatch(name, pattern) for name in modules)]
    if templates and unmatched:
        raise ErasecError(
            f"no module is named {unmatched[0]!r}",
            why="keep_in_fp32 takes patterns of names of modules with weights",
            fix="give patterns such as *norm* or mid_block",
        )


def _origin_digest(origin: Origin | None, component: str) -> str:
    """What identifies a base file: the base's component, and the keys of the tensors that are not in the file."""
    if origin is None:
        return ""
    content = json.dumps([origin.components[component], sorted(origin.replaced(component))])
    return hashlib.sha256(content.encode()).hexdigest()


def _check_shared(share: Path, name: str, key: str, origin: str) -> None:
    """Raise ErasecError where the folder ``share`` has another graph, or was linked from another base."""
    shared: Mapping[str, Any] = {**read_manifest(share)["graphs"].get(name, {})}
    for what, expected in (("graph", key), ("origin", origin)):
        if not expected or shared.get(what) != expected:
            raise ErasecError(
                f"the data of {share / name} cannot be shared",
                why=f"its {what} differs from this model's",
                fix="share a folder of the same base, precision and edited tensors; or leave the option base out",
            )


def tensor_reader(
    checkpoint: Folder, graph: Graph, linked: Mapping[str, Any], extras: Extras
) -> Callable[[str], Array]:
    """A function that computes an initializer of a graph, by its name, from the checkpoint: for checks of linked files.

    ``linked`` is the graph's part of the manifest, so that a folder can be checked on a machine that cannot trace.
    """
    weights = tuple(map(weight_from_json, linked["weights"]))
    entries = checkpoint.entries(graph.component)
    keys = _stored_keys(graph.component, weights, entries)
    return _weight_reader(keys, entries, extras, weights)
