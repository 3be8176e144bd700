"""``erasec relink``: replaces the edit in an ONNX folder. Only the file of edited tensors is written, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from erasec.checkpoint import manifest as folder_manifest
from erasec.checkpoint.folder import CONTENT, check_links
from erasec.checkpoint.safetensors import Entry, copy_file, hard_link
from erasec.checkpoint.staging import output, settle
from erasec.errors import ErasecError
from erasec.graphs.graph import Weight, weight_from_json
from erasec.graphs.link import EDITED, Array, lay_out, read_array, write_data
from erasec.graphs.manifest import MANIFEST, file_records, read_manifest, write_manifest
from erasec.model.edit_file import MERGED, read_content


@dataclass(frozen=True)
class RelinkResult:
    """The result of ``relink``: the folder, and the number of tensors and bytes written."""

    path: Path
    tensors: int
    bytes: int


def relink(
    folder: Path,
    file: Path,
    out: Path | None = None,
    merged: Callable[[str, str], Array] | None = None,
    hard: bool = False,
) -> RelinkResult:
    """Replace the edit in an ONNX folder, or in its copy ``out``, by the edit of ``file``.

    The edited tensors come from the edit file ("--target edit:tensors=true"), or from ``merged``, which is called with
    a component and a key. Only model.edited.onnx_data and the manifest are written. The other files of a copy are
    copied, or hard-linked with ``hard``. The folder is replaced as a whole. Raises ErasecError if the folder has
    another base than the edit, or if its edited tensors are not those of the edit.

    A copy gets a manifest of all its files. Where a manifest lists the folder, the written files are renewed in it.
    """
    result_path, folder = out or folder, folder.resolve()  # a folder is replaced under its own name, not a link's
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet, or leave out --out")
    if out is not None and out.resolve().is_relative_to(folder):
        raise ErasecError(
            f"{out} lies in {folder}", why="the copy would become a part of the folder", fix="give a path outside of it"
        )
    if out is None and Path.cwd().is_relative_to(folder):
        raise ErasecError(
            f"{folder} holds the working directory",
            why="the folder is replaced as a whole",
            fix="change to another directory, or give --out DIR",
        )
    settle(folder)
    check_links(folder)
    folder_manifest.check_readable([folder])
    manifest = read_manifest(folder)
    entries, sites = read_edit(file)
    stored = {key.removeprefix(MERGED): entry for key, entry in entries.items() if key.startswith(MERGED)}
    _check_same(manifest, sites, folder, file)
    if not stored and merged is None:
        raise ErasecError(
            f"{file.name} does not hold the tensors that it changes",
            why="it holds only their changes",
            fix="give the base with --model MODEL; or write the edit with --target edit:tensors=true",
        )
    if stored and (lost := sorted(sites.keys() - stored.keys())):
        raise ErasecError(
            f"{file.name} is damaged",
            why=f"it holds some of the edited tensors, but not {lost[0]}",
            fix="fetch or build the edit again",
        )

    def read(component: str, weight: Weight) -> Array:
        name = f"{component}/{weight.key}"
        if stored:
            array = read_array(stored[name])
        else:
            assert merged is not None
            array = merged(component, weight.key)
        if not np.isfinite(array).all():
            raise ErasecError(
                f"{name} is not finite in {file.name}",
                why="pictures would be black or noise",
                fix="build the edit again with a lower scale or a higher ridge",
            )
        return lay_out(array, weight)

    count = size = 0
    written: list[str] = []
    before = _states(folder, file)
    with output(out or folder, fresh=out is not None) as own:
        stage = own.new_folder()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if path.name in (EDITED, MANIFEST):
                continue
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (hard_link if out is None or hard else copy_file)(path, stage / name)
        for graph_name, graph in manifest["graphs"].items():
            weights = [weight_from_json(item) for item in graph["edited"]]
            if not weights:
                continue
            record = write_data(stage / graph_name / EDITED, weights, partial(read, graph["component"]))
            graph["files"][EDITED] = {"bytes": record["bytes"], "sha256": record["sha256"]}
            written.append(f"{graph_name}/{EDITED}")
            count, size = count + len(weights), size + record["bytes"]
        write_manifest(stage, {key: value for key, value in manifest.items() if key != "schema"})
        known = file_records(manifest)
        if out is not None:
            folder_manifest.write(stage, known)
        if _states(folder, file) != before:
            raise ErasecError(
                f"{folder} or {file} has changed while it was read",
                why="another program wrote it; the result may be partly old and partly new",
                fix="run the command again when no other program writes them",
            )
        own.publish()
    if out is None:
        files = {folder / name: known[name] for name in written}
        folder_manifest.renew([*files, folder / MANIFEST], files)
    return RelinkResult(result_path, count, size)


def _states(folder: Path, file: Path) -> dict[Path, list[int]]:
    """What changes when one of the files that a result is made of is written, by path."""
    paths = [file, *(path for path in folder.rglob("*") if path.is_file())]
    return {path: [getattr(path.stat(), name) for name in CONTENT] for path in paths}


def read_edit(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of an edit file, and the digest of each base tensor that it changes, by "component/key"."""
    entries, content = read_content(file)
    if any(edit.get(kind) for edit in content["edits"] for kind in ("memories", "tokens", "negative")):
        raise ErasecError(
            f"{file.name} is more than changes of weights",
            why="it also has a memory, tokens or a negative prompt, which change the graphs",
            fix="build it: erasec build MODEL --target onnx",
        )
    return entries, content["about"]["sites"]


def _check_same(manifest: Mapping[str, Any], sites: Mapping[str, str], folder: Path, file: Path) -> None:
    """Raise ErasecError unless the edit and the folder have the same base and the same edited tensors."""
    if carried := manifest.get("carried"):
        raise ErasecError(
            f"{folder} is more than weights",
            fix="build it: erasec build MODEL --target onnx",
            why=f"it carries {', '.join(carried)}, which a change of weights does not replace",
        )
    base_digests: dict[str, str] = {
        f"{graph['component']}/{item['key']}": manifest["base"].get(f"{graph['component']}/{item['key']}", "")
        for graph in manifest["graphs"].values()
        for item in graph["edited"]
    }
    if unmatched := sorted(base_digests.keys() ^ sites.keys()):
        where = "the folder" if unmatched[0] in base_digests else file.name
        raise ErasecError(
            f"{file.name} changes other tensors than the edit in {folder}",
            why=f"{unmatched[0]} is only in {where}",
            fix="build the edit for onnx instead: erasec build MODEL --erase CONCEPT --target onnx",
        )
    if different := sorted(key for key, digest in base_digests.items() if digest != sites[key]):
        raise ErasecError(
            f"{file.name} is for another base than {folder}",
            why=f"{different[0]} differs in the two bases",
            fix="solve the edit on the base of the folder",
        )
