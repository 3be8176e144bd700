"""The cache of weightless graphs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.graphs.graph import MODEL, Weight

if TYPE_CHECKING:
    from onnx import ModelProto

# Keys of a component's config that do not change what it computes.
DESCRIPTIVE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def cache_folder() -> Path:
    """The folder of the cache: $ERASEC_CACHE, or erasec in $XDG_CACHE_HOME, or ~/.cache/erasec."""
    explicit, shared = os.environ.get("ERASEC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(explicit).expanduser() if explicit else Path(shared or "~/.cache").expanduser() / "erasec"


def computing_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a component's config that determines what it computes."""
    return {key: value for key, value in config.items() if key not in DESCRIPTIVE and not key.startswith("_")}


def is_whole(root: Path) -> bool:
    """Whether a cached graph has the bytes that were stored: other programs may have truncated or changed the files."""
    try:
        digest = (root / "digest").read_text()
        return digest == _digest((root / MODEL).read_bytes(), (root / "weights.json").read_bytes())
    except OSError:
        return False


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def store(root: Path, model: ModelProto, weights: Sequence[Weight]) -> None:
    """Write a graph to the folder ``root`` of the cache, whole or not at all.

    Where several processes store the same graph at once, the first one stays. Raises OSError where the graph can be
    neither written nor read.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".graph-", dir=root.parent))
    scratch.chmod(0o755)  # mkdtemp lets only its owner in, and users may share a cache
    try:
        contents = (
            model.SerializeToString(deterministic=True),
            json.dumps([asdict(weight) for weight in weights]).encode(),
        )
        (scratch / MODEL).write_bytes(contents[0])
        (scratch / "weights.json").write_bytes(contents[1])
        (scratch / "digest").write_text(_digest(*contents))
        if not is_whole(root):
            shutil.rmtree(root, ignore_errors=True)
            os.replace(scratch, root)
    except OSError:
        if not is_whole(root):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
