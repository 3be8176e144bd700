"""Another edit for an ONNX folder that is there: only the file of edited tensors is written, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from erasec.checkpoint.safetensors import Entry, copy, hard_link, read_header
from erasec.checkpoint.staging import put, restore, staged
from erasec.errors import ErasecError
from erasec.graphs.graph import Weight, weight_from
from erasec.graphs.link import EDITED, MANIFEST, Array, array, laid_out, read_manifest, write_data, write_manifest
from erasec.model.edit import MERGED


@dataclass(frozen=True)
class Relinked:
    """What ``relink`` wrote: where, how many tensors and bytes."""

    path: Path
    tensors: int
    bytes: int


def relink(
    folder: Path, file: Path, out: Path | None = None, merged: Callable[[str, str], Array] | None = None,
    hard: bool = False,
) -> Relinked:  # fmt: skip
    """Put the edit of ``file`` into an ONNX folder in place of the one that is there; or into a copy of it, ``out``.

    The edited tensors are those that the edit file holds ("--target edit:tensors=true"), or what ``merged`` gives of a
    component and key. Only model.edited.onnx_data and the manifest are written; all other files of a copy are copied,
    or where ``hard`` linked. The folder is whole before or after, never between. Raises ErasecError where the folder
    was not linked from the base of the edit, or the edit changes other tensors than the one that is there.
    """
    shown, folder = out or folder, folder.resolve()  # what takes a folder's place must know its name and not a link's
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet, or none to change the folder")
    if out is not None and out.resolve().is_relative_to(folder):
        raise ErasecError(f"{out} lies in {folder}", why="a copy in the folder would be a part of it",
                          fix="give a path beside it")  # fmt: skip
    if out is None and Path.cwd().is_relative_to(folder):
        raise ErasecError(f"{folder} holds the working directory", why="the folder is replaced as a whole",
                          fix="go elsewhere, or give --out DIR")  # fmt: skip
    restore(folder)
    told = read_manifest(folder)
    entries, sites = read_edit(file)
    held = {key.removeprefix(MERGED): entry for key, entry in entries.items() if key.startswith(MERGED)}
    _check_same(told, sites, folder, file)
    if not held and merged is None:
        raise ErasecError(
            f"{file.name} does not hold the tensors that it changes", why="it says how they change, of the base's",
            fix="give the base with --model MODEL; or write the edit with --target edit:tensors=true",
        )  # fmt: skip
    if held and (lost := sorted(sites.keys() - held.keys())):
        raise ErasecError(f"{file.name} is damaged", why=f"it holds some tensors, and not {lost[0]}",
                          fix="fetch or build the edit again")  # fmt: skip

    def read(component: str, weight: Weight) -> Array:
        name = f"{component}/{weight.key}"
        if held:
            stored = array(held[name])
        else:
            assert merged is not None
            stored = merged(component, weight.key)
        if not np.isfinite(stored).all():
            raise ErasecError(f"{name} is not finite in {file.name}", why="pictures would be black or noise",
                              fix="build the edit again, weaker")  # fmt: skip
        return laid_out(stored, weight)

    count = size = 0
    target = out.resolve() if out else folder
    with staged(target) as stage:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if path.name in (EDITED, MANIFEST):
                continue
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (hard_link if out is None or hard else copy)(path, stage / name)
        for name, graph in told["graphs"].items():
            weights = [weight_from(item) for item in graph["edited"]]
            if not weights:
                continue
            done = write_data(stage / name / EDITED, weights, partial(read, graph["component"]))
            graph["files"][EDITED] = done
            count, size = count + len(weights), size + done["bytes"]
        write_manifest(stage, {key: value for key, value in told.items() if key != "schema"})
        put(stage, target)
    return Relinked(shown, count, size)


def read_edit(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of an edit file, and the base's digest of each tensor that it changes, by "component/key"."""
    if not file.is_file():
        raise ErasecError(f"there is no edit file {file}", fix="erasec build MODEL --erase CONCEPT --target edit")
    entries, metadata = read_header(file)
    try:
        content = json.loads(metadata["erasec.edit"])
        sites = dict(content["about"]["sites"])
        carried = any(each.get(kind) for each in content["edits"] for kind in ("memories", "tokens", "negative"))
    except (KeyError, TypeError, ValueError) as error:
        raise ErasecError(
            f"{file.name} is no edit file of erasec", why="its metadata does not describe edits", where=str(file),
            fix="an edit file is written by: erasec build MODEL --erase CONCEPT --target edit",
        ) from error  # fmt: skip
    if carried:
        raise ErasecError(
            f"{file.name} is more than changes of weights", why="what it has beside them changes the graph",
            fix="build it: erasec build MODEL --target onnx",
        )  # fmt: skip
    return entries, sites


def _check_same(told: Mapping[str, Any], sites: Mapping[str, str], folder: Path, file: Path) -> None:
    """Raise ErasecError unless the edit changes just the tensors that the folder holds apart, of the same base."""
    if carried := told.get("carried"):
        raise ErasecError(
            f"{folder} is more than weights", fix="build it: erasec build MODEL --target onnx",
            why=f"it carries {', '.join(carried)}, which no change of weights replaces",
        )  # fmt: skip
    here: dict[str, str] = {
        f"{graph['component']}/{item['key']}": told["base"].get(f"{graph['component']}/{item['key']}", "")
        for graph in told["graphs"].values() for item in graph["edited"]
    }  # fmt: skip
    if other := sorted(here.keys() ^ sites.keys()):
        whose = "the folder" if other[0] in here else file.name
        raise ErasecError(
            f"{file.name} changes other tensors than {folder} holds apart", why=f"{other[0]} is only in {whose}",
            fix="build the edit for onnx instead: erasec build MODEL --erase CONCEPT --target onnx",
        )  # fmt: skip
    if other := sorted(key for key, digest in here.items() if digest != sites[key]):
        raise ErasecError(
            f"{file.name} is for another base than {folder}", why=f"{other[0]} is another tensor there",
            fix="solve the edit on the base of the folder",
        )  # fmt: skip
