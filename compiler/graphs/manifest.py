"""The manifest of an ONNX folder: erasec.json, which describes what each file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import AfterValidator, ConfigDict, StringConstraints, with_config
from typing_extensions import TypedDict

from erasec.base import Context
from erasec.checkpoint.manifest import FileRecord
from erasec.checkpoint.safetensors import atomic_write
from erasec.documents import Count, Sha256, Source, parse_json, read_text
from erasec.errors import ErasecError
from erasec.graphs.signature import COMPONENTS, NAMES

T = TypeVar("T")

SCHEMA = "erasec.onnx/1"
MANIFEST = "erasec.json"


@with_config(ConfigDict(extra="allow"))
class _Schema(TypedDict):
    schema: str


def read_record(path: Path, schema: str, kind: type[T], what: str, fix: str) -> T:
    """Read a JSON file of erasec, of the type ``kind``, whose "schema" must be ``schema``.

    Raises ErasecError, which says that the folder of ``path`` is no ``what``.
    """
    source = Source(str(path.parent), str(path), fix, f"is no {what}")
    if not path.is_file():
        raise source.error(f"it has no {path.name}")
    text = read_text(path)
    if (present := parse_json(text, _Schema, source)["schema"]) != schema:
        raise ErasecError(
            f"{path} has the schema {present}",
            why=f"this version of erasec reads {schema}",
            fix="use the version of erasec that built it, or build the folder again",
        )
    return parse_json(text, kind, source)


class File(TypedDict):
    """A file of a folder: its size and its sha256."""

    bytes: Count
    sha256: Sha256


class WeightRecord(TypedDict):
    """The fields of a ``graphs.graph.Weight``."""

    name: str
    key: str
    source: list[Count]
    axes: list[Count]
    shape: list[Count]
    dtype: Literal["float16", "float32"]


def _check_axes(weight: WeightRecord) -> WeightRecord:
    if sorted(weight["axes"]) != list(range(len(weight["source"]))) or prod(weight["shape"]) != prod(weight["source"]):
        raise ValueError("its shape is no other arrangement of its source")
    return weight


GraphName = Annotated[str, StringConstraints(pattern=f"^({'|'.join(NAMES)})$")]
ComponentName = Annotated[str, StringConstraints(pattern=f"^({'|'.join(COMPONENTS)})$")]
CheckedWeight = Annotated[WeightRecord, AfterValidator(_check_axes)]


@with_config(ConfigDict(extra="allow"))
class GraphRecord(TypedDict):
    """What a manifest says of one graph; ``weights`` and ``edited`` are fields of ``graphs.graph.Weight``."""

    component: ComponentName
    graph: str
    origin: NotRequired[str]
    precision: str
    files: dict[str, File]
    weights: list[CheckedWeight]
    edited: list[CheckedWeight]


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict):
    """The manifest of an ONNX folder. The names of graphs are folders that erasec writes to."""

    precision: str
    vae: str
    graphs: dict[GraphName, GraphRecord]
    files: dict[str, File]
    base: dict[str, str]
    carried: list[str]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an ONNX folder. Raises ErasecError where there is none, or it is damaged or of another schema."""
    fix = "erasec build MODEL --erase CONCEPT --target onnx   writes one"
    return read_record(folder / MANIFEST, SCHEMA, Manifest, "ONNX folder of erasec", fix)


def file_records(manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The sizes and digests of all files of an ONNX folder, except the manifest. Raises ErasecError where it is
    damaged."""
    try:
        listed = dict(manifest["files"])
        for graph, content in manifest["graphs"].items():
            listed |= {f"{graph}/{name}": file for name, file in content["files"].items()}
        return {name: FileRecord.model_validate(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ErasecError(f"{MANIFEST} is damaged", why="it does not list its files", fix="build it again") from error


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of an ONNX folder, whole or not at all."""
    content = json.dumps({"schema": SCHEMA, **manifest}, sort_keys=True) + "\n"
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class Origin:
    """The base that a checkpoint is a variant of.

    ``components`` are the digests of the base's components. ``tensors`` are the digests of those base tensors that the
    variant replaces, by "component/key".
    """

    components: Mapping[str, str]
    tensors: Mapping[str, str]

    def replaced(self, component: str) -> tuple[str, ...]:
        """The keys of the tensors of ``component`` that the variant replaces."""
        return tuple(key.split("/", 1)[1] for key in self.tensors if key.startswith(f"{component}/"))


@dataclass(frozen=True)
class LinkContext(Context):
    """A context for targets that link graphs. ``origin`` is the base of the checkpoint, None where it is unknown."""

    origin: Origin | None = None


def origin_of(context: Context) -> Origin | None:
    """The base of the checkpoint that is exported; None where the context does not have it."""
    return context.origin if isinstance(context, LinkContext) else None
