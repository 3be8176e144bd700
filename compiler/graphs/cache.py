"""The cache of weightless graphs, and its place; patched engines and pictures of base models lie next to them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.disk import DiskFull, named_errors
from erasec.checkpoint.owned import process_scratch, scratch_folder
from erasec.graphs.graph import MODEL, Weight
from erasec.progress import note

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPHS_BYTES = 20_000_000  # the graphs of one model, without weights: an upper estimate
# Keys of a component's config that do not change what it computes.
DESCRIPTIVE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


DIGEST = 32  # bytes of a sha256


def read_entry(folder: str, name: str) -> bytes | None:
    """The content of an entry in a folder of the cache; None where it is not there, or its bytes have changed."""
    with unusable_is_noted():
        path = cache_folder() / folder / name
        stored = path.read_bytes() if path.is_file() else b""
        if stored and stored[:DIGEST] == hashlib.sha256(stored[DIGEST:]).digest():
            return stored[DIGEST:]
    return None


def write_entry(folder: str, name: str, content: bytes) -> None:
    """Write an entry, its sha256 before its content, whole or not at all. A cache that cannot be written is a note."""
    with unusable_is_noted():
        path = cache_folder() / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent) as scratch:
            (scratch / "entry").write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(scratch / "entry", path)


def cache_folder() -> Path:
    """The folder of the cache: $ERASEC_CACHE, or erasec in $XDG_CACHE_HOME, or ~/.cache/erasec.

    Raises OSError where none of them is set and there is no home directory.
    """
    explicit, shared = os.environ.get("ERASEC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(explicit).expanduser() if explicit else Path(shared or "~/.cache").expanduser() / "erasec"
    except RuntimeError as error:
        raise OSError(f"{error} (set ERASEC_CACHE)") from error


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


def cached_graph(key: str, make: Callable[[], tuple[ModelProto, Sequence[Weight]]]) -> Path:
    """The folder of the graph ``key``: in the cache, or made now and stored there.

    Where the cache can be neither read nor written, a note says so once, and the graph is kept until the process ends.
    """
    root = None
    with unusable_is_noted():
        root = cache_folder() / "graphs" / key
    if root is not None and is_whole(root):
        return root
    own = process_scratch() / "graphs" / key
    if is_whole(own):
        return own
    with named_errors(own):
        content = make()
    if root is not None:
        with unusable_is_noted():
            store(root, *content)
            return root
    with named_errors(own):
        store(own, *content)
    return own


@contextmanager
def unusable_is_noted() -> Iterator[None]:
    """Turn an error of the disk in the block into a note on stderr: the cache is a convenience."""
    try:
        yield
    except (OSError, DiskFull) as error:
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename is not None else ""
        _note(f"{error.what if isinstance(error, DiskFull) else error.strerror or error}{where}")


@cache
def _note(why: str) -> None:
    """Print the note once for each cause."""
    note(f"the cache cannot be used ({why}): what it would hold is made again in every build")


def store(root: Path, model: ModelProto, weights: Sequence[Weight]) -> None:
    """Write a graph to the folder ``root`` of the cache, whole or not at all.

    Where several processes store the same graph at once, the first one stays. Raises OSError where the graph can be
    neither written nor read.
    """
    contents = (
        model.SerializeToString(deterministic=True),
        json.dumps([asdict(weight) for weight in weights]).encode(),
    )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(root.parent) as scratch:
            graph = scratch / "graph"
            graph.mkdir()
            (graph / MODEL).write_bytes(contents[0])
            (graph / "weights.json").write_bytes(contents[1])
            (graph / "digest").write_text(_digest(*contents))
            if not is_whole(root):
                shutil.rmtree(root, ignore_errors=True)
                os.replace(graph, root)
    except OSError:
        if not is_whole(root):
            raise


def caches() -> list[Path]:
    """The folders of the cache in which commands that were killed may have left scratch folders."""
    try:
        return [cache_folder() / name for name in ("graphs", "engines", "pictures")]
    except OSError:
        return []
