"""Files of erasec's own that carry a digest of their content: edits, keys, priors, extras, and training states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.safetensors import Entry, content_digest, read_header, save_tensors, tensors_digest
from erasec.errors import ErasecError
from erasec.progress import note

if TYPE_CHECKING:
    from torch import Tensor

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


def _seal(content: str, metadata: Mapping[str, str]) -> str:
    """sha256 over the digest of a file's tensors and over its metadata."""
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    return hashlib.sha256(f"{content}\n{json.dumps(rest, sort_keys=True)}".encode()).hexdigest()


@lru_cache
def _say_not_verified(path: Path) -> None:
    note(f"{path.name} is not verified: erasec 0.1.0 wrote no digest of its content into it")
