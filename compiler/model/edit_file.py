"""The edit file: edits and all that they carry, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.checkpoint.safetensors import Entry, read_finite
from erasec.checkpoint.sealed import read_metadata, read_sealed, save_sealed
from erasec.documents import Source
from erasec.errors import ErasecError, shown
from erasec.family import Shape, Site
from erasec.model.edit import PARTS, Delta, Edit, Remap
from erasec.model.memory import ExtrasRecord, pack_extras, unpack_extras

if TYPE_CHECKING:
    from torch import Tensor


# Files without memories, tokens and negative prompts have the format 1, which older versions can read.
FORMAT = 2
SUFFIX = ".edit.safetensors"
# The prefix of merged tensors' names.
MERGED = "tensors/"
METADATA = "erasec.edit"
# Kinds of changes by their names in a file.
KINDS = {kind.__name__: kind for kind in PARTS}


def write_edits(
    path: Path,
    edits: Sequence[Edit],
    base_record: Mapping[str, Any],
    sums: bool = True,
    merged: Mapping[str, Tensor] | None = None,
) -> None:
    """Save edits as one file, in the order in which they apply. ``base_record`` is plain data, see
    ``Model.base_record``.

    Tensors are named REMAP.left, SITE.left, SITE.right or SITE.value for changes, by concept for sums (left out without
    ``sums``), and by ``pack_extras`` for the rest. Factors stay in float64, so that ``erasec apply`` writes the same
    bytes as the build. Secrets and curves are left out. ``merged`` are weights after all edits, by "component/key";
    they are stored as tensors/COMPONENT/KEY.
    """
    tensors = {f"{MERGED}{name}": tensor for name, tensor in (merged or {}).items()}
    records = []
    for number, edit in enumerate(edits):
        remap_names: dict[int, str] = {}
        delta_records = []
        for site, delta in edit.deltas.items():
            name = f"{number}/{site.component}/{site.key}"
            if isinstance(delta, Remap):
                name = remap_names.setdefault(id(delta), f"{number}/remap.{len(remap_names)}")
            tensors |= {f"{name}.{key}": vars(delta)[key] for key in PARTS[type(delta)]}
            delta_records.append({"site": asdict(site), "kind": type(delta).__name__, "tensor": name})
        stored_sums = edit.sums if sums else {}
        for concept, parts in stored_sums.items():
            tensors |= {f"{number}/sums/{concept}/{key}": value for key, value in parts.items()}
        extra_tensors, extra_metadata = pack_extras(edit.memories, edit.tokens, edit.negative, f"{number}/")
        tensors |= extra_tensors
        records.append(
            {
                "by": edit.by,
                **_concept_record(edit),
                "params": dict(edit.params),
                "base": edit.base,
                "stats": dict(edit.stats),
                "deltas": delta_records,
                "sums": {concept: sorted(parts) for concept, parts in stored_sums.items()},
                "asked": {concept: dict(phrases) for concept, phrases in edit.phrases.items()},
                **extra_metadata,
            }
        )
    has_extras = any(edit.memories or edit.tokens or edit.negative for edit in edits)
    content = {"format": FORMAT if has_extras else 1, "about": dict(base_record), "edits": records}
    save_sealed(path, tensors, {METADATA: json.dumps(content, sort_keys=True, ensure_ascii=False)})


class _DeltaRecord(TypedDict):
    site: Site
    kind: Literal["LowRank", "Remap", "Dense"]
    tensor: str


class _EditRecord(ExtrasRecord):
    by: str
    concept: str
    concepts: NotRequired[list[str]]
    params: dict[str, bool | int | float | str]
    base: str
    stats: dict[str, float]
    deltas: list[_DeltaRecord]
    sums: dict[str, list[str]]
    asked: dict[str, dict[str, list[str]]]


@with_config(ConfigDict(extra="allow"))
class BaseRecord(TypedDict):
    """What an edit file stores about the model that it was made for, see ``Model.base_record``."""

    model: str
    revision: NotRequired[str]
    family: str
    sites: dict[str, str]


@with_config(ConfigDict(extra="allow"))
class Content(TypedDict):
    """The metadata of an edit file."""

    format: int
    about: BaseRecord
    edits: Annotated[list[_EditRecord], Field(min_length=1)]


def read_content(path: Path) -> tuple[dict[str, Entry], Content]:
    """The tensors of an edit file and the content of its metadata. No tensor is read.

    Raises ErasecError where it is no edit file of erasec, or its metadata does not fit its tensors.
    """
    if not path.is_file():
        raise ErasecError(f"there is no edit file {path}", fix="erasec build MODEL --erase CONCEPT --target edit")
    entries, metadata = read_sealed(path, METADATA)
    fix = "write one with: erasec build MODEL --erase CONCEPT --target edit"
    source = Source(path.name, str(path), fix, "is no edit file of erasec")
    content = read_metadata(metadata, METADATA, Content, FORMAT, source)
    for record in content["edits"]:
        if any(not {"erase", "keep"} <= phrases.keys() for phrases in record["asked"].values()):
            raise source.error("it does not say which phrases a concept erases and keeps")
        if record["sums"] and (lost := sorted(record["asked"].keys() - record["sums"].keys())):
            raise source.error(f"it has no sums of the concept {shown(lost[0])}")
        for item in record["deltas"]:
            site = f"{item['site'].component}/{item['site'].key}"
            if site not in content["about"]["sites"]:
                raise source.error(f"it has no digest of the base's tensor {site}")
            parts = PARTS[KINDS[item["kind"]]]
            shapes = [entries[name].shape for part in parts if (name := f"{item['tensor']}.{part}") in entries]
            if len(shapes) < len(parts) or not _fits(item["kind"], item["site"].shape, shapes):
                raise source.error(f"it has no {item['kind']} change of the shape of {site}")
    return entries, content


def _fits(kind: str, site: Shape, shapes: Sequence[Shape]) -> bool:
    """Whether tensors of these ``shapes`` are a change of this kind, of a weight of the shape ``site``."""
    if kind == "Dense":
        return shapes[0] == site
    left, right = shapes
    if not len(site) == len(left) == len(right) == 2:
        return False
    outer = (site[0] if kind == "LowRank" else site[1], site[1])
    return left[1] == right[0] and (left[0], right[1]) == outer


def read_edits(path: Path) -> tuple[tuple[Edit, ...], BaseRecord]:
    """The edits of a file and its base record. Raises ErasecError as ``read_content`` does, and where a number is not
    finite."""
    entries, content = read_content(path)
    edits = tuple(_read_edit(number, record, entries) for number, record in enumerate(content["edits"]))
    return edits, content["about"]


def _read_edit(number: int, record: _EditRecord, entries: Mapping[str, Entry]) -> Edit:
    by_name: dict[str, Delta] = {}  # sites that share a Remap share it again after reading
    deltas = {}
    for item in record["deltas"]:
        name, kind = item["tensor"], KINDS[item["kind"]]
        if name not in by_name:
            by_name[name] = kind(*(read_finite(entries, f"{name}.{part}") for part in PARTS[kind]))
        deltas[item["site"]] = by_name[name]
    sums = {
        concept: {key: read_finite(entries, f"{number}/sums/{concept}/{key}") for key in keys}
        for concept, keys in record["sums"].items()
    }
    memories, tokens, negative = unpack_extras(record, entries, f"{number}/", read_finite)
    return Edit(
        deltas,
        record["by"],
        _read_concepts(record),
        record["base"],
        record["params"],
        stats=record["stats"],
        sums=sums,
        phrases=record["asked"],
        memories=memories,
        tokens=tokens,
        negative=negative,
    )


def _concept_record(edit: Edit) -> dict[str, Any]:
    """The names of an edit's concepts as the file stores them: joined to one text, and also as a list where a reader
    could not tell them from the text and the phrases."""
    joined = ", ".join(edit.concepts)
    record = {"concept": joined, "asked": edit.phrases}
    return {"concept": joined} | ({} if _read_concepts(record) == edit.concepts else {"concepts": list(edit.concepts)})


def _read_concepts(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "concepts" in record:
        return tuple(record["concepts"])
    return tuple(sorted(record["asked"])) if record["asked"] else (record["concept"],)
