"""The linker: weightless graphs and a checkpoint's tensors become an ONNX folder, without torch and without tracing.

Weights are external data in two files: model.onnx_data, what the checkpoint has in common with what it is a variant of,
and model.edited.onnx_data, the tensors that a variant replaces. So another variant is another, small second file.
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

from erasec.checkpoint.safetensors import Entry, atomic, copy, file_digest, hard_link
from erasec.errors import ErasecError
from erasec.graphs.graph import (
    COPIED,
    EMBEDDING,
    MEMORY,
    Graph,
    Template,
    Weight,
    graphs,
    weight_from,
    with_whole_prompts,
)
from erasec.model import sidecar as extras_
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.base import Origin
    from erasec.checkpoint.folder import Folder
    from erasec.model.sidecar import Extras

SCHEMA = "erasec.onnx/1"
MANIFEST = "erasec.json"
BASE, EDITED = "model.onnx_data", "model.edited.onnx_data"
NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
OPSET = 18
# Norms add up squares, of which few go beyond what float16 can hold; they are cheap.
ISLANDS = ("*norm*",)
# What old configs lack and the reader then guesses wrongly or warns about; the values are diffusers' own defaults.
DEFAULTS: dict[str, dict[str, Any]] = {"unet": {"time_cond_proj_dim": None}, "vae": {"scaling_factor": 0.18215}}
PAGE = 4096  # where readers may map a tensor into memory as it lies
NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# Names of one tensor in the module that is traced now and in checkpoints that older libraries wrote.
PREFIX = "text_model."
OLDER = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

Array = NDArray[Any]
Read = Callable[[Weight], Array]


def link(
    template: Template, entries: Mapping[str, Entry], folder: Path, replaced: Iterable[str] = (),
    extras: Extras | None = None, share: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``folder``/model.onnx with its data: the tensors of ``entries`` as the template lays them out.

    Those that ``replaced`` names, and what ``extras`` holds, go to model.edited.onnx_data. ``share`` is a folder that
    was linked from the same base: its model.onnx_data is linked hard and not written. One tensor is in memory at a
    time. Returns what the manifest says of it. Raises ErasecError where a tensor is missing or of another shape, or the
    shared file is not what this one would be.
    """
    keys = {weight.key: _stored(weight, entries) for weight in template.weights if not _beside(weight)}
    by_name = {weight.name: weight for weight in template.weights}
    one = _reader(entries, extras, by_name)
    edited = set(replaced)
    apart = [weight for weight in template.weights if _carried(weight, extras) or keys[weight.key] in edited]
    common = [weight for weight in template.weights if weight not in apart]

    folder.mkdir(parents=True, exist_ok=True)
    places, told = dict[str, tuple[str, int, int]](), dict[str, Any]()
    for name, weights in ((BASE, common), (EDITED, apart)):
        listed = _places(weights)
        places |= {weight.name: (name, *place) for weight, place in zip(weights, listed, strict=True)}
        if not weights:
            continue
        if name == BASE and share is not None:
            told[name] = _shared(share / BASE, folder / BASE, _end(listed))
        else:
            told[name] = write_data(folder / name, weights, lambda weight: one(weight.name))
    model = template.load()
    for tensor in model.graph.initializer:
        for key, value in zip(("location", "offset", "length"), places[tensor.name], strict=True):
            tensor.external_data.add(key=key, value=str(value))
    content = model.SerializeToString(deterministic=True)
    with atomic(folder / "model.onnx") as temporary:
        temporary.write_bytes(content)
    told["model.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "graph": template.key,
        "files": told,
        "weights": [asdict(weight) for weight in template.weights],
        "edited": [asdict(weight) | {"key": keys.get(weight.key, weight.key)} for weight in apart],
    }


def _reader(
    entries: Mapping[str, Entry], extras: Extras | None, weights: Mapping[str, Weight]
) -> Callable[[str], Array]:  # fmt: skip
    def read(name: str) -> Array:
        weight = weights[name]
        if _beside(weight):
            return _memory(weight, extras)
        more = extras.tokens if extras and weight.key.endswith(EMBEDDING) else {}
        return laid_out(array(entries[_stored(weight, entries)]), weight, list(more.values()))

    return read


def write_data(path: Path, weights: Sequence[Weight], read: Read) -> dict[str, Any]:
    """Write tensors one after the other, each from a whole page on; returns the file's bytes and sha256."""
    digest, size = hashlib.sha256(), 0
    with atomic(path) as temporary, temporary.open("r+b") as file:
        for weight, (offset, length) in zip(weights, _places(weights), strict=True):
            content = read(weight)
            if content.nbytes != length:
                raise ErasecError(f"{weight.key} has {content.nbytes} bytes, and its graph wants {length}")
            data = content.reshape(-1).view(np.uint8).data
            for part in (bytes(offset - size), data):
                digest.update(part)
                file.write(part)
            size = offset + length
    return {"bytes": size, "sha256": digest.hexdigest()}


def _places(weights: Sequence[Weight]) -> list[tuple[int, int]]:
    """Offset and length in bytes of each tensor in a file of its own kind."""
    places, at = [], 0
    for weight in weights:
        at += -at % PAGE
        length = int(np.prod(weight.shape, dtype=np.int64)) * np.dtype(weight.dtype).itemsize
        places.append((at, length))
        at += length
    return places


def _end(places: Sequence[tuple[int, int]]) -> int:
    return sum(places[-1]) if places else 0


def _beside(weight: Weight) -> bool:
    return weight.key.startswith(MEMORY)


def _carried(weight: Weight, extras: Extras | None) -> bool:
    """Whether a tensor holds what ``extras`` do: a memory, or the embedding that new tokens are rows of."""
    return _beside(weight) or bool(extras and extras.tokens and weight.key.endswith(EMBEDDING))


def _memory(weight: Weight, extras: Extras | None) -> Array:
    number, part = weight.key.removeprefix(f"{MEMORY}_").split("_")
    assert extras is not None  # the template was made for them
    rows = getattr(extras.memories[int(number)], part).float().numpy()
    return laid_out(rows, weight)


def laid_out(stored: Array, weight: Weight, more: Sequence[Any] = ()) -> Array:
    """A checkpoint's tensor as the graph wants it: more rows below, axes in its order, its shape and dtype.

    Raises ErasecError where it does not fit, or does not fit into float16.
    """
    if more:
        stored = np.concatenate([stored, *(row.float().numpy()[None] for row in more)])
    if stored.shape != weight.source:
        raise ErasecError(
            f"{weight.key} is {stored.shape}", why=f"the model's configuration says {weight.source}",
            fix="the config.json beside the weights is another model's: fetch the folder again",
        )  # fmt: skip
    turned = stored.transpose(weight.axes).reshape(weight.shape)
    with np.errstate(over="ignore"):
        made: Array = np.ascontiguousarray(turned, dtype=weight.dtype)
    if weight.dtype == "float16" and not np.isfinite(made).all() and np.isfinite(stored).all():
        raise ErasecError(
            f"{weight.key} does not fit into float16", why=f"its largest number is {np.abs(stored).max():g}",
            fix="name its module as an island that stays float32: islands=...",
        )  # fmt: skip
    return made


def array(entry: Entry) -> Array:
    """One tensor of a safetensors file, bfloat16 widened to float32."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        data = stream.read(entry.stop - entry.start)
    if entry.dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif entry.dtype in NUMPY:
        flat = np.frombuffer(data, NUMPY[entry.dtype])
    else:
        raise ErasecError(f"a weight is stored as {entry.dtype}", why=f"linked are {', '.join(NUMPY)} and BF16",
                          where=str(entry.file))  # fmt: skip
    return flat.reshape(entry.shape[::-1]).T if entry.transposed else flat.reshape(entry.shape)


def _stored(weight: Weight, entries: Mapping[str, Entry]) -> str:
    """The name in a checkpoint of a parameter. Raises ErasecError where it has none."""
    names = [weight.key, PREFIX + weight.key, weight.key.removeprefix(PREFIX)]
    older = weight.key
    for new, old in OLDER.items():
        older = older.replace(new, old)
    for name in (*names, older):
        if name in entries:
            return name
    raise ErasecError(
        f"the checkpoint has no {weight.key}", why="its graph reads it, and random numbers would take its place",
        where=str(next(iter(entries.values())).file.parent) if entries else "", fix="fetch the model again",
    )  # fmt: skip


def _shared(source: Path, target: Path, size: int) -> dict[str, Any]:
    """Link another folder's data file; returns what that one's manifest says of it. Raises ErasecError for another."""
    told = read_manifest(source.parent.parent)["graphs"][source.parent.name]["files"].get(BASE)
    if told is None or not source.is_file() or source.stat().st_size != size or told["bytes"] != size:
        raise ErasecError(
            f"{source} cannot be shared", why="it is not as large as this model's own would be",
            fix="share a folder that was built from the same base, with edits of the same tensors",
        )  # fmt: skip
    hard_link(source, target)
    return dict(told)


def write(
    checkpoint: Folder, out: Path, precision: str = "fp32", names: Sequence[str] = NAMES, *, vae: str = "fp32",
    islands: Sequence[str] = ISLANDS, opset: int = OPSET, origin: Origin | None = None, share: Path | None = None,
) -> tuple[Graph, ...]:  # fmt: skip
    """Write the ONNX folder of a checkpoint, in the layout of ORTStableDiffusionPipeline; returns its graphs.

    Text encoder and UNet are of ``precision``, the VAE of ``vae``'s; inputs and outputs are float32 in any case.
    ``islands`` name modules that compute in float32 where the rest does not. Memories, new tokens and a negative prompt
    that the checkpoint carries are part of what is written. With an ``origin``, tensors that are others there lie
    apart, and ``share`` may be an ONNX folder of the same origin. Raises ErasecError for a model that the graphs do not
    cover.
    """
    from erasec.graphs.export import negative_ids, template  # which need torch, and nothing else here does

    every = [graph for graph in graphs(checkpoint) if graph.name in names]
    carried = extras_.read(checkpoint.root)
    for name in checkpoint.files():
        if name.parts[0] in COPIED or name.as_posix() == "model_index.json":
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            copy(checkpoint.root / name, out / name)
    negative = negative_ids(checkpoint, carried, out)
    told: dict[str, Any] = {"precision": precision, "vae": vae, "graphs": {}, "carried": sorted(carried.kinds)}
    told["base"] = dict(origin.tensors) if origin else {}
    prepared = []
    with bar("graphs", len(every)) as advance:
        for graph in every:
            advance(0, graph.name)
            if negative and graph.name == "text_encoder":
                graph = with_whole_prompts(graph)
            kind = vae if graph.component == "vae" else precision
            own = islands_of(checkpoint, graph, islands)
            made = template(checkpoint, graph, kind, opset, own, carried,
                            negative if graph.name == "text_encoder" else ())  # fmt: skip
            prepared.append((graph, kind, made))
            advance()
    _check_islands(islands, [made for _, kind, made in prepared if kind == "fp16"])
    with bar("link onnx", len(every)) as advance:
        for graph, kind, made in prepared:
            advance(0, graph.name)
            folder = out / graph.name
            folder.mkdir(parents=True, exist_ok=True)
            config = DEFAULTS.get(graph.component, {}) | checkpoint.config(graph.component)
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            edited = origin.of(graph.component) if origin else ()
            about = {"component": graph.component, "precision": kind, "origin": _origin(origin, graph.component)}
            if share is not None:
                _check_shared(share, graph.name, made.key, about["origin"])
            from_other = share / graph.name if share is not None else None
            entries = checkpoint.entries(graph.component)
            told["graphs"][graph.name] = about | link(made, entries, folder, edited, carried, from_other)
            advance()
    linked = {path for graph, *_ in prepared for path in (out / graph.name).glob("model.*")}
    others = (path for path in sorted(out.rglob("*")) if path.is_file() and path not in linked)
    told["files"] = {
        path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in others
    }
    write_manifest(out, told)
    return tuple(graph for graph, *_ in prepared)


def islands_of(checkpoint: Folder, graph: Graph, islands: Sequence[str]) -> tuple[str, ...]:
    """``islands``, and attention where the model says that it overflows float16, as Stable Diffusion 2.1's does."""
    upcast = graph.name == "unet" and checkpoint.config("unet").get("upcast_attention")
    return (*islands, *(("*.attn1", "*.attn2") if upcast else ()))


def _check_islands(islands: Sequence[str], halved: Sequence[Template]) -> None:
    """Raise ErasecError for a pattern that names a module of none of the graphs in float16."""
    keys = {weight.key for made in halved for weight in made.weights}
    modules = {key[:at] for key in keys for at, letter in enumerate(key) if letter == "."}
    lost = [pattern for pattern in islands if not any(fnmatch(name, pattern) for name in modules)]
    if halved and lost:
        raise ErasecError(
            f"no module is named {lost[0]!r}", why="an island names modules with weights, such as *norm* or mid_block"
        )


def _origin(origin: Origin | None, component: str) -> str:
    """What a base file stands for: the base's component, without the tensors that lie apart."""
    if origin is None:
        return ""
    told = json.dumps([origin.components[component], sorted(origin.of(component))])
    return hashlib.sha256(told.encode()).hexdigest()


def _check_shared(share: Path, name: str, key: str, origin: str) -> None:
    there = read_manifest(share)["graphs"].get(name, {})
    for what, mine in (("graph", key), ("origin", origin)):
        if not mine or there.get(what) != mine:
            raise ErasecError(
                f"the data of {share / name} cannot be shared", why=f"its {what} is another one",
                fix="share a folder of the same base, precision and edited tensors; or leave the option base out",
            )  # fmt: skip


def stored_tensor(
    checkpoint: Folder, graph: Graph, told: Mapping[str, Any], carried: Extras
) -> Callable[[str], Array]:  # fmt: skip
    """What an initializer of a graph must be, by its name: read from the checkpoint now. For checks of what was linked.

    ``told`` is what the manifest says of the graph, so that a folder can be checked where its graph was not traced.
    """
    weights = {weight.name: weight for weight in map(weight_from, told["weights"])}
    return _reader(checkpoint.entries(graph.component), carried, weights)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an ONNX folder of erasec says of itself. Raises ErasecError for another folder."""
    path = folder / MANIFEST
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if told["schema"] != SCHEMA:
            raise ErasecError(
                f"{path} is {told['schema']}", why=f"this erasec knows {SCHEMA}", fix="build the folder again"
            )
        if strange := sorted(set(told["graphs"]) - set(NAMES)):  # these are folders, and written to
            raise ValueError(f"it names a graph {strange[0]!r}")
        return told
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ErasecError(
            f"{folder} is no ONNX folder of erasec", why=f"it has no sound {MANIFEST}",
            fix="erasec build MODEL --erase CONCEPT --target onnx   writes one",
        ) from error  # fmt: skip


def write_manifest(folder: Path, told: Mapping[str, Any]) -> None:
    content = json.dumps({"schema": SCHEMA, **told}, sort_keys=True) + "\n"
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(content, encoding="utf-8")
