"""``erasec apply``: merges an edit file into a checkpoint; and into an ONNX folder, with tensors of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.checkpoint import journal, manifest
from erasec.checkpoint.sealed import patch_sealed
from erasec.checkpoint.staging import check_free, check_fresh, output
from erasec.commands.output_paths import check_disjoint, check_not_working_directory
from erasec.commands.relink import RelinkResult
from erasec.commands.relink import relink as relink_folder
from erasec.errors import CheckFailed, ErasecError
from erasec.ldm.single_file import SingleFile
from erasec.model import loading
from erasec.model.edit import Remap
from erasec.model.edit_file import read_edits
from erasec.model.sidecar import describe, gather_extras
from erasec.recipe.goals import first_disputed, recorded_goals
from erasec.reporting.earlier import erased_before

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.edit import Edit
    from erasec.model.view import Model


@dataclass(frozen=True)
class ApplyResult:
    """The result of ``apply``: the path, the number of changed tensors and bytes, and notes for the user."""

    path: Path
    tensors: int
    bytes: int
    notes: tuple[str, ...]


def apply(
    file: Path,
    name: str,
    out: Path | None = None,
    in_place: bool = False,
    link: bool = False,
    transfer: bool = False,
    revision: str | None = None,
    variant: str = "",
    allow_pickle: bool = False,
) -> ApplyResult:
    """Merge the edits of ``file`` into the model ``name``: write the result to ``out``, or change the model in place.

    A folder becomes a folder. A single file becomes a single file if the name of ``out`` ends in .safetensors, and a
    diffusers folder otherwise. All other bytes stay as they are. The tensors that the edit changes must be those of its
    base model; with ``transfer``, only their family and shapes must agree. Raises ErasecError, or CheckFailed if a
    merged number is not finite.

    A new single file has the digest of its content in its metadata, which ``erasec check`` compares, and which later
    edits in place renew.
    """
    if in_place == (out is not None):
        raise ErasecError("the place of the result is not clear", fix="give either --out PATH or --in-place")
    edits, about = read_edits(file)
    if kinds := gather_extras(edits).kinds:
        raise ErasecError(
            f"{file.name} is more than changes of weights",
            why=f"it has {describe(kinds)}, which a checkpoint cannot hold",
            fix="build a folder that can, with the recipe of the edit: erasec build RECIPE --target bundle",
        )
    model = loading.load(name, revision, variant, allow_pickle)
    if out is None:
        _check_in_place(model, allow_pickle, link)
    else:
        out = out.expanduser()
        _check_out(out, model, link)
    notes = _check_fits(model, edits, about, file.name, transfer) + _goal_notes(model, edits)
    for edit in edits:
        model = model.with_edit(replace(edit, base=""))
    changed = {
        component: {key: _check_finite(key, merge) for key, merge in tensors.items()}
        for component, tensors in model.merged().items()
    }
    copies = model.source.other_copies(changed)
    if out is None:
        if copies:
            raise ErasecError(
                f"{name} is not edited in place",
                where=str(model.source.root),
                why=f"the folder has further copies of the weights that would stay unedited: {_listed(copies)}",
                fix="delete or move them, or give --out DIR, which leaves them out",
            )
        model.check_unchanged()
        journal.patch_in_place(model.source.by_file(changed))
    else:
        _write(model, out, changed, link)
        if copies:
            notes += (f"Left out, because they are unedited copies of edited weights: {_listed(copies)}.",)
    notes += _loading_notes(model, out)
    entries = [model.entries(component)[key] for component in changed for key in changed[component]]
    size = sum(entry.stop - entry.start for entry in entries)
    return ApplyResult(Path(name).expanduser() if out is None else out, len(entries), size, notes)


def relink(
    folder: Path,
    file: Path,
    out: Path | None,
    name: str,
    link: bool = False,
    revision: str | None = None,
    variant: str = "",
    allow_pickle: bool = False,
) -> RelinkResult:
    """``commands.relink.relink`` with edited tensors that are merged from the base model ``name``."""
    edits, about = read_edits(file)
    model = loading.load(name, revision, variant, allow_pickle)
    _check_fits(model, edits, about, file.name, transfer=False)
    for edit in edits:
        model = model.with_edit(replace(edit, base=""))
    tensors = model.merged()

    def merged(component: str, key: str) -> NDArray[Any]:
        tensor = _check_finite(key, tensors[component][key])()
        model.check_unchanged()
        return np.asarray(tensor.float())

    return relink_folder(folder, file, out, merged, link)


def _goal_notes(model: Model, edits: Sequence[Edit]) -> tuple[str, ...]:
    """A sentence for each concept of the edits that becomes what was erased from the model before."""
    erased = [phrase for concept in erased_before(model) for phrase in concept.phrases]
    if not erased:
        return ()
    records = {name: edit.phrases.get(name, {}) for edit in edits for name in edit.concepts}
    return tuple(
        f"{name} becomes {goal!r}, which was erased from {model.name} before: the result may show it again."
        for name, record in records.items()
        if (goal := first_disputed(recorded_goals(record, name), erased))
    )


def _check_in_place(model: Model, allow_pickle: bool, link: bool) -> None:
    """Raise ErasecError for a model whose files must not change."""
    why = ""
    if model.name in loading.BUNDLED:
        why = "it is part of erasec"
    elif allow_pickle:
        why = "erasec does not write pickles"
    elif model.revision:
        why = "its files lie in the hub's cache, where other programs expect the published weights"
    if why:
        raise ErasecError(f"{model.name} is not edited in place", why=why, fix="give --out PATH")
    if link:
        raise ErasecError("--link is for copies", why="--in-place makes none", fix="leave out --link")


def _check_out(out: Path, model: Model, link: bool) -> None:
    """Raise ErasecError if ``out`` exists, lies in or around the model, or has the suffix of another format."""
    check_not_working_directory(out)
    check_disjoint(out, model)
    suffix, single = out.suffix.lower(), _writes_file(model, out)
    if suffix in loading.PICKLES:
        raise ErasecError(f"{out} is named as a pickle", why="erasec does not write pickles", fix="give --out PATH")
    if suffix == ".safetensors" and not single:
        raise ErasecError(f"{out} would be a single file, and the model is a folder", fix="give a folder: --out DIR")
    if single and link:
        raise ErasecError("--link is for folders", why=f"{out} would be a single file", fix="leave out --link")
    check_fresh(out)
    if out.is_symlink() or (out.exists() and single):
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet")
    check_free(out)


def _writes_file(model: Model, out: Path) -> bool:
    return isinstance(model.source, SingleFile) and out.suffix.lower() == ".safetensors"


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.as_posix() for path in paths)


def _loading_notes(model: Model, out: Path | None) -> tuple[str, ...]:
    """Notes about how the result must be loaded."""
    if isinstance(model.source, SingleFile):
        return () if out is None or _writes_file(model, out) else model.source.notes
    variants = {model.source.variant_of(component) for component in model.family.components} - {""}
    return tuple(
        f'The weights are the variant {name}: load the folder with variant="{name}".' for name in sorted(variants)
    )


def _write(model: Model, path: Path, changed: Mapping[str, Mapping[str, Callable[[], Tensor]]], link: bool) -> None:
    with output(path, fresh=True, total=model.source.size()) as own:
        if isinstance(model.source, SingleFile) and _writes_file(model, path):
            patch_sealed(model.source.file, own.stage, model.source.by_file(changed)[model.source.file])
        else:
            model.source.write(own.new_folder(), changed, link)
            manifest.write(own.stage)
        model.check_unchanged()
        own.publish()


def _check_finite(key: str, merge: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``merge``, which raises CheckFailed if its tensor is not finite."""

    def checked() -> Tensor:
        tensor = merge()
        if not bool(tensor.isfinite().all()):
            raise CheckFailed(
                f"the new {key} is not finite",
                why=f"a number is too large for {tensor.dtype}",
                fix="the edit is too strong for this precision: lower its scale or raise its ridge",
            )
        return tensor

    return checked


def _check_fits(
    model: Model, edits: Sequence[Edit], about: Mapping[str, Any], file: str, transfer: bool
) -> tuple[str, ...]:
    """Notes about a transfer to another model than the base. Raises ErasecError if the edit is not for this model."""
    if about["family"] != model.family.name:
        raise ErasecError(
            f"{file} is for {about['family']}, and {model.name} is {model.family.name}",
            why="the weights and text encoders of the two families differ",
            fix="solve it again on this model: erasec build",
        )
    shapes = {(site.component, site.key): site.shape for site in model.parameters}
    for site in {site for edit in edits for site in edit.deltas}:
        shape = shapes.get((site.component, site.key))
        if shape != site.shape:
            raise ErasecError(
                f"{file} changes {site.key} {site.shape}", why=f"in {model.name} it is {shape or 'missing'}"
            )
    digests = about["sites"]
    edited = {f"{site.component}/{site.key}": site for edit in edits for site in edit.deltas}
    different = [key for key, site in sorted(edited.items()) if model.site_digest(site) != digests[key]]
    if not different:
        return ()
    if not transfer:
        raise ErasecError(
            f"{file} was made for another model ({about['model']})",
            why=f"{len(different)} of the {len(edited)} tensors that it changes differ from its base, such as "
            f"{different[0]}",
            fix="solve it again on this model with erasec build; or, for a fine-tune of the same base, --transfer",
        )
    remaps = all(isinstance(delta, Remap) for edit in edits for delta in edit.deltas.values())
    return (
        f"{file} was solved on {about['model']}: {len(different)} of the {len(edited)} edited tensors differ here.",
        "It is a map of text states: its effect is the same if both models have the same text encoder."
        if remaps
        else "Its changes of the weights were computed for its base and are added to other weights here.",
        "Whether the concept is gone and the rest is kept was not measured on this model.",
    )
