"""The manifest of an ONNX folder: erasec.json, which describes what each file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasec.base import Context
from erasec.checkpoint.manifest import FileRecord
from erasec.checkpoint.safetensors import atomic_write
from erasec.errors import ErasecError
from erasec.graphs.signature import NAMES

SCHEMA = "erasec.onnx/1"
MANIFEST = "erasec.json"


def load_json(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON file whose "schema" must be ``schema``.

    Raises ErasecError for another schema, and OSError, ValueError, KeyError or TypeError for a missing or damaged file.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["schema"] != schema:
        raise ErasecError(
            f"{path} has the schema {content['schema']}",
            why=f"this version of erasec reads {schema}",
            fix="use the version of erasec that built it, or build the folder again",
        )
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an ONNX folder. Raises ErasecError where there is none, or it is damaged or of another schema."""
    try:
        manifest = load_json(folder / MANIFEST, SCHEMA)
        if unknown := sorted(set(manifest["graphs"]) - set(NAMES)):  # the names are folders that erasec writes to
            raise ValueError(f"it lists a graph {unknown[0]!r}")
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ErasecError(
            f"{folder} is no ONNX folder of erasec",
            why=f"its {MANIFEST} is missing or damaged",
            fix="erasec build MODEL --erase CONCEPT --target onnx   writes one",
        ) from error


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
