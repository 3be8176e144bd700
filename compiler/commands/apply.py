"""Apply edit files to checkpoints, and put edit files of several concepts together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec import registry
from erasec.base import with_options
from erasec.checkpoint import journal
from erasec.checkpoint.safetensors import patch
from erasec.checkpoint.staging import put, staged
from erasec.closed_form.base import ClosedForm
from erasec.commands import relink as relinks
from erasec.commands.output_paths import check_apart, check_not_around
from erasec.commands.plan import EXTRAS
from erasec.errors import CheckFailed, ErasecError
from erasec.family import FAMILIES
from erasec.ldm.single_file import SingleFile
from erasec.model import edit as edits_
from erasec.model import sidecar as extras
from erasec.model import view as models

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.commands.relink import Relinked
    from erasec.model.edit import Edit
    from erasec.model.view import Model


@dataclass(frozen=True)
class Applied:
    """What ``apply`` wrote: where, how many tensors and bytes it changed, and what it cannot promise."""

    path: Path
    tensors: int
    bytes: int
    notes: tuple[str, ...]


def apply(
    file: Path, name: str, out: Path | None = None, in_place: bool = False, link: bool = False, transfer: bool = False,
    revision: str | None = None, variant: str = "", allow_pickle: bool = False,
) -> Applied:  # fmt: skip
    """Merge the edits of ``file`` into the model ``name``: to ``out``, or in the model's own files.

    A folder gives a folder, a single file a single file or, where ``out`` is not named .safetensors, the folder that it
    amounts to; every other byte is the same. The base is known by the tensors that the edit changes; another one raises
    ErasecError, unless ``transfer``: then the family and shapes must agree.
    """
    if in_place == (out is not None):
        raise ErasecError("where to is not clear", fix="give either --out PATH or --in-place")
    edits, told = edits_.read(file)
    if kinds := extras.gathered(edits).kinds:
        raise ErasecError(
            f"{file.name} is more than changes of weights", why=f"it has {_words(kinds)}, which apply has no place for",
            fix="erasec build MODEL with the recipe of the edit   writes a folder that holds it: bundle",
        )  # fmt: skip
    model = models.load(name, revision, variant, allow_pickle)
    if out is None:
        _check_in_place(model, allow_pickle, link)
    else:
        out = out.expanduser()
        _check_out(out, model, link)
    notes = _fits(model, edits, told, file.name, transfer)
    for edit in edits:
        model = model.with_edit(replace(edit, base=""))
    changed = {
        component: {key: _finite(key, make) for key, make in tensors.items()}
        for component, tensors in model.merged().items()
    }
    copies = model.source.doubles(changed)
    if out is None:
        if copies:
            raise ErasecError(
                f"{name} is not edited in place", where=str(model.source.root),
                why=f"further copies of the weights would keep what the edit takes away: {_listed(copies)}",
                fix="delete them or move them elsewhere, or give --out DIR, which leaves them out",
            )  # fmt: skip
        journal.patch_in_place_many(model.source.placed(changed))
    else:
        _write(model, out, changed, link)
        if copies:
            notes += (f"Left out, as unedited copies of edited weights: {_listed(copies)}.",)
    notes += _read_as(model, out)
    entries = [model.entries(component)[key] for component in changed for key in changed[component]]
    size = sum(entry.stop - entry.start for entry in entries)
    return Applied(Path(name).expanduser() if out is None else out, len(entries), size, notes)


def relink(
    folder: Path, file: Path, out: Path | None, name: str, link: bool = False, revision: str | None = None,
    variant: str = "", allow_pickle: bool = False,
) -> Relinked:  # fmt: skip
    """``relink.relink`` with tensors that are merged here from the base, the model ``name``."""
    edits, told = edits_.read(file)
    model = models.load(name, revision, variant, allow_pickle)
    _fits(model, edits, told, file.name, transfer=False)
    for edit in edits:
        model = model.with_edit(replace(edit, base=""))
    made = model.merged()

    def merged(component: str, key: str) -> NDArray[Any]:
        return np.asarray(_finite(key, made[component][key])().float())

    return relinks.relink(folder, file, out, merged, link)


def _words(kinds: frozenset[str]) -> str:
    return ", ".join(EXTRAS[kind] for kind in sorted(kinds))


def _check_in_place(model: Model, allow_pickle: bool, link: bool) -> None:
    why = ""
    if model.name in models.BUNDLED:
        why = "it ships with erasec"
    elif allow_pickle:
        why = "a pickle is never written"
    elif model.revision:
        why = "its files lie in the hub's cache, where other programs take them for the published ones"
    if why:
        raise ErasecError(f"{model.name} is not edited in place", why=why, fix="give --out PATH")
    if link:
        raise ErasecError("--link is for copies", why="--in-place makes none", fix="leave out --link")


def _check_out(out: Path, model: Model, link: bool) -> None:
    """Raise ErasecError for a path that is taken, lies in or around the model, or is named as what it will not be."""
    check_not_around(out)
    check_apart(out, model)
    suffix, single = out.suffix.lower(), _is_file(model, out)
    if suffix in models.PICKLES:
        raise ErasecError(f"{out} is named as a pickle", why="a pickle is never written", fix="give --out PATH")
    if suffix == ".safetensors" and not single:
        raise ErasecError(f"{out} would be a single file, and the model is a folder", fix="give a folder: --out DIR")
    if single and link:
        raise ErasecError("--link is for folders", why=f"{out} would be a single file", fix="leave out --link")
    if out.is_dir() and any(out.iterdir()):
        raise ErasecError(f"the output folder {out} is not empty", fix="give a path that does not exist yet")
    if out.is_symlink() or (out.exists() and (single or not out.is_dir())):
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet")


def _is_file(model: Model, out: Path) -> bool:
    return isinstance(model.source, SingleFile) and out.suffix.lower() == ".safetensors"


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.as_posix() for path in paths)


def _read_as(model: Model, out: Path | None) -> tuple[str, ...]:
    """Sentences on how what was written must be read."""
    if isinstance(model.source, SingleFile):
        return () if out is None or _is_file(model, out) else model.source.notes
    variants = {model.source.variant_of(component) for component in model.family.components} - {""}
    return tuple(f'Its weights are the variant {name}: load it with variant="{name}".' for name in sorted(variants))


def _write(model: Model, path: Path, changed: Mapping[str, Mapping[str, Callable[[], Tensor]]], link: bool) -> None:
    if isinstance(model.source, SingleFile) and _is_file(model, path):
        patch(model.source.file, path, model.source.placed(changed)[model.source.file])
        return
    with staged(path) as stage:
        model.source.write(stage, changed, link)
        put(stage, path)


def _finite(key: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def checked() -> Tensor:
        tensor = make()
        if not bool(tensor.isfinite().all()):
            raise CheckFailed(
                f"the new {key} is not finite", why=f"a number is too large for {tensor.dtype}",
                fix="the edit is too strong for this precision: lower its scale or raise its ridge",
            )  # fmt: skip
        return tensor

    return checked


def _fits(model: Model, edits: Sequence[Edit], told: Mapping[str, Any], file: str, transfer: bool) -> tuple[str, ...]:
    """Sentences about what cannot be promised. Raises ErasecError where the edit is not for this model."""
    if told["family"] != model.family.name:
        raise ErasecError(
            f"{file} is for {told['family']}, and {model.name} is {model.family.name}",
            why="their matrices and text states are not the same", fix="solve it again on this model: erasec build",
        )  # fmt: skip
    here = {(site.component, site.key): site.shape for site in model.parameters}
    for site in {site for edit in edits for site in edit.deltas}:
        shape = here.get((site.component, site.key))
        if shape != site.shape:
            raise ErasecError(
                f"{file} changes {site.key} {site.shape}", why=f"in {model.name} it is {shape or 'missing'}"
            )
    digests = told["sites"]
    found = {f"{site.component}/{site.key}": site for edit in edits for site in edit.deltas}
    other = [key for key, site in sorted(found.items()) if model.site_digest(site) != digests[key]]
    if not other:
        return ()
    if not transfer:
        raise ErasecError(
            f"{file} was made for another model ({told['model']})",
            why=f"{len(other)} of the {len(found)} tensors that it changes are not its base's, such as {other[0]}",
            fix="solve it again on this model with erasec build; or, for a fine-tune of the same base, --transfer",
        )
    remaps = all(isinstance(delta, edits_.Remap) for edit in edits for delta in edit.deltas.values())
    return (
        f"{file} was solved on {told['model']}: {len(other)} of the {len(found)} edited tensors are others here.",
        "It is a map of text states, so it does here what it does there as far as both read the same text encoder."
        if remaps else "Its changes of the weights were computed for its base, and only added here.",
        "That the concept is gone and all else is kept was not measured on this model: build on it, or audit it.",
    )  # fmt: skip


def combine(files: Sequence[Path], without: Sequence[str], out: Path) -> Edit:
    """Solve the concepts of several edit files, less those named in ``without``, as one edit, from their stored sums.

    No model is needed, and the result is what a build of these concepts would have given, in whatever order they come.
    Raises ErasecError where the files are not of one pass with one set of options on one base.
    """
    if out.exists():
        raise ErasecError(f"{out} exists", fix="give a path that does not exist yet")
    every = [(file, *edits_.read(file)) for file in files]
    first, told = every[0][1][0], every[0][2]
    sums: dict[str, Mapping[str, Tensor]] = {}
    asked: dict[str, Mapping[str, Sequence[str]]] = {}
    for file, edits, _ in every:
        if len(edits) != 1 or not edits[0].sums:
            raise ErasecError(
                f"{file.name} cannot be combined", why="it is no single closed-form edit with its sums",
                fix="erasec build MODEL --erase C --pass uce --target edit   makes one that can",
            )  # fmt: skip
        if kinds := extras.gathered(edits).kinds:
            raise ErasecError(
                f"{file.name} cannot be combined", why=f"it has {_words(kinds)}, which no sums stand for",
                fix="build the concepts together: erasec build MODEL --erase A --erase B",
            )  # fmt: skip
        _same(first, edits[0], every[0][0].name, file.name)
        for concept in edits[0].sums:
            if concept in sums and concept not in ("", *without):
                raise ErasecError(f"{concept!r} is in two of the files", fix="give it once")
        sums |= edits[0].sums
        asked |= edits[0].asked
    for concept in without:
        if concept not in asked:
            raise ErasecError(f"no file holds {concept!r}", why=f"there are: {', '.join(sorted(asked))}")
        del sums[concept], asked[concept]
    if not asked:
        raise ErasecError("nothing is left to erase", fix="keep at least one concept")
    _undisputed(asked)
    kind = registry.load_pass(first.by)
    assert issubclass(kind, ClosedForm)
    streams = {
        stream.name: tuple(s for s in first.deltas if s.attn == stream.attn and s.proj in stream.projections)
        for stream in FAMILIES[told["family"]].streams
    }
    made = replace(with_options(kind, first.params, first.by).edit(streams, sums), base=first.base, asked=asked)
    edits_.write(out, [made], told)
    return made


def _same(one: Edit, other: Edit, name: str, other_name: str) -> None:
    for what, a, b in (("pass", one.by, other.by), ("base", one.base, other.base)):
        if a != b:
            raise ErasecError(f"{name} and {other_name} differ in their {what}", why=f"{a[:24]} and {b[:24]}")
    params = {key for key in (*one.params, *other.params) if one.params.get(key) != other.params.get(key)}
    if params:
        key = min(params)
        why = f"{key} is {one.params.get(key)!r} in one and {other.params.get(key)!r} in the other"
        raise ErasecError(f"{name} and {other_name} were made with other options", why=why)
    shared, others = one.sums.get("", {}), other.sums.get("", {})
    if shared.keys() != others.keys() or any(not bool((shared[key] == others[key]).all()) for key in shared):
        raise ErasecError(f"{name} and {other_name} were made with other priors", fix="make them with the same prior")


def _undisputed(asked: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    for one, phrases in asked.items():
        erased = {phrase.casefold() for other in asked if other != one for phrase in asked[other]["erase"]}
        if both := [phrase for phrase in phrases["keep"] if phrase.casefold() in erased]:
            raise ErasecError(
                f"{one} keeps {both[0]!r}, which another of the concepts erases",
                why="solved together, the two would meet half way", fix="build them together: --erase A --erase B",
            )  # fmt: skip
