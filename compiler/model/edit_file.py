"""The edit file: edits and all that they carry, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.safetensors import Entry, check_format, read_sealed, read_tensor, save_sealed
from erasec.errors import ErasecError
from erasec.family import Site
from erasec.model.edit import PARTS, Delta, Edit, Remap
from erasec.model.memory import pack_extras, unpack_extras

if TYPE_CHECKING:
    from torch import Tensor


# Files without memories, tokens and negative prompts have the format 1, which older versions can read.
FORMAT = 2
SUFFIX = ".edit.safetensors"
# The prefix of merged tensors' names.
MERGED = "tensors/"


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
    save_sealed(path, tensors, {"erasec.edit": json.dumps(content, sort_keys=True, ensure_ascii=False)})


@contextmanager
def edit_content(path: Path) -> Iterator[tuple[dict[str, Entry], dict[str, Any]]]:
    """The tensors of an edit file and the content of its metadata.

    Raises ErasecError where it is no edit file of erasec. A KeyError, TypeError or ValueError in the block also becomes
    this error, because the content then is not what ``write_edits`` writes.
    """
    if not path.is_file():
        raise ErasecError(f"there is no edit file {path}", fix="erasec build MODEL --erase CONCEPT --target edit")
    entries, metadata = read_sealed(path, "erasec.edit")
    try:
        content = json.loads(metadata["erasec.edit"])
        check_format(path, content["format"], FORMAT)
        yield entries, content
    except (KeyError, TypeError, ValueError) as error:
        raise ErasecError(
            f"{path.name} is no edit file of erasec",
            why="its metadata does not describe edits",
            where=str(path),
            fix="write one with: erasec build MODEL --erase CONCEPT --target edit",
        ) from error


def read_edits(path: Path) -> tuple[tuple[Edit, ...], dict[str, Any]]:
    """The edits of a file and its base record. Raises ErasecError where it is no edit file of erasec."""
    with edit_content(path) as (entries, content):
        edits = tuple(_read_edit(number, record, entries) for number, record in enumerate(content["edits"]))
        return edits, content["about"]


def _read_edit(number: int, record: Mapping[str, Any], entries: Mapping[str, Any]) -> Edit:
    kinds = {kind.__name__: kind for kind in PARTS}
    by_name: dict[str, Delta] = {}  # sites that share a Remap share it again after reading
    deltas = {}
    for item in record["deltas"]:
        name = item["tensor"]
        if name not in by_name:
            kind = kinds[item["kind"]]
            by_name[name] = kind(*(read_tensor(entries[f"{name}.{part}"]) for part in PARTS[kind]))
        deltas[Site(**{**item["site"], "shape": tuple(item["site"]["shape"])})] = by_name[name]
    sums = {
        concept: {key: read_tensor(entries[f"{number}/sums/{concept}/{key}"]) for key in keys}
        for concept, keys in record["sums"].items()
    }
    fields = {name: record[name] for name in ("by", "base", "params", "stats")}
    memories, tokens, negative = unpack_extras(record, entries, f"{number}/")
    return Edit(
        deltas,
        concepts=_read_concepts(record),
        sums=sums,
        phrases=record["asked"],
        memories=memories,
        tokens=tokens,
        negative=negative,
        **fields,
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
