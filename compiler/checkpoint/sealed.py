"""Files that carry a digest of their content: edits, keys, priors, extras, training states, edited single files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.checkpoint.safetensors import (
    Entry,
    content_digest,
    patch_file,
    read_header,
    save_tensors,
    tensors_digest,
)
from erasec.documents import Source, parse_json
from erasec.errors import ErasecError
from erasec.progress import note

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

DIGEST = "erasec.digest"  # the metadata key of the digest


def save_sealed(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    private: bool = False,
    durable: bool = False,
) -> None:
    """Write tensors as ``save_tensors`` does, with a digest of the content that ``read_sealed`` compares."""
    metadata = {"format": "pt", **(metadata or {})}
    save_tensors(path, tensors, metadata | {DIGEST: _seal(tensors_digest(tensors), metadata)}, private, durable)


def read_sealed(path: Path, kind: str = "") -> tuple[dict[str, Entry], dict[str, str]]:
    """``read_header`` of a file that ``save_sealed`` wrote, after its whole content was compared with its digest.

    Raises ErasecError if they differ. A file of erasec 0.1.0 has no digest: it is read, and stderr says so once. With
    ``kind``, the metadata key of a kind of file, stderr says so only of files of that kind.
    """
    entries, metadata = read_header(path)
    if DIGEST not in metadata and (not kind or kind in metadata):
        _say_not_verified(path)
    if DIGEST in metadata and metadata[DIGEST] != _seal(content_digest(entries), metadata):
        raise ErasecError(
            f"{path.name} is damaged",
            why="its content is not what was written: the digest in its header is another",
            where=str(path),
            fix="copy it again from where it was made, or make it again",
        )
    return entries, metadata


@with_config(ConfigDict(extra="allow"))
class _Versioned(TypedDict):
    format: Annotated[int, Field(ge=1)]


def read_metadata(metadata: Mapping[str, str], name: str, kind: type[T], newest: int, source: Source) -> T:
    """The entry ``name`` of a file's metadata: JSON of the type ``kind``, whose ``format`` is at most ``newest``.

    Raises ErasecError if there is none, it is damaged, or it has a later format.
    """
    if name not in metadata:
        raise source.error(f"its metadata has no entry {name}")
    number = parse_json(metadata[name], _Versioned, source)["format"]
    if number > newest:
        raise ErasecError(
            f"{source.what} has the format {number}",
            where=source.where,
            why=f"this version of erasec reads formats up to {newest}",
            fix="pip install --upgrade erasec",
        )
    return parse_json(metadata[name], kind, source)


def patch_sealed(base: Path, path: Path, changed: Mapping[str, Callable[[], Tensor]]) -> None:
    """``patch_file`` of a file with or without a digest; the new file has one, which ``read_sealed`` compares.

    Each function in ``changed`` is called twice. Raises ErasecError where ``base`` differs from its own digest.
    """
    metadata = {key: value for key, value in read_header(base)[1].items() if key != DIGEST}
    patch_file(base, path, changed, metadata | {DIGEST: _patched_seal(base, changed)})


def new_seal(file: Path, changed: Mapping[str, Callable[[], Tensor]]) -> tuple[int, bytes] | None:
    """Where the digest of a file lies in it, and the digest that it has after ``changed`` as in ``patch_sealed``.

    None where the file has no digest. Raises ErasecError where the file differs from its digest.
    """
    if DIGEST not in read_header(file)[1]:
        return None
    digest = _patched_seal(file, changed).encode()
    with file.open("rb") as handle:
        head = handle.read(8)
        head += handle.read(int.from_bytes(head, "little"))
    # Other programs may have written the header anew. Quotes within a text have a backslash before them.
    place = re.search(rb'"%b"\s*:\s*"' % re.escape(DIGEST.encode()), head)
    if place is None:
        raise ErasecError(
            f"{file.name} is not edited in place",
            why=f"its header spells the name {DIGEST} with escapes",
            where=str(file),
            fix="write a new one instead: --out PATH",
        )
    return place.end(), digest


def _patched_seal(file: Path, changed: Mapping[str, Callable[[], Tensor]]) -> str:
    """The digest of a file after ``changed``. Raises ErasecError where its content now differs from its own digest."""
    entries, metadata = read_header(file)
    if DIGEST in metadata:
        read_sealed(file)
    return _seal(content_digest(entries, changed), metadata)


def _seal(content: str, metadata: Mapping[str, str]) -> str:
    """sha256 over the digest of a file's tensors and over its metadata."""
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    return hashlib.sha256(f"{content}\n{json.dumps(rest, sort_keys=True)}".encode()).hexdigest()


@lru_cache
def _say_not_verified(path: Path) -> None:
    note(f"{path.name} is not verified: erasec 0.1.0 wrote no digest of its content into it")
