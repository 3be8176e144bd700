"""Target edit: the edits alone, as one small file for ``erasec apply`` and ``erasec combine``."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, EditTarget
from erasec.checkpoint.safetensors import Entry, read_header, read_tensor, tensor_bytes
from erasec.checkpoint.staging import file_name
from erasec.model import edit_file
from erasec.model.memory import pack_extras
from erasec.model.sidecar import KINDS, Extras, gather_extras, read_extras
from erasec.options import options

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model


@options
class EditFile(EditTarget):
    """The edit file. ``sums`` are the sums of closed-form passes: without them it is smaller, and cannot be combined
    with others. With ``tensors`` it also has the edited tensors with all edits, for ``erasec relink`` without the base
    model.

    An edit file also undoes its edit: with it and the erased checkpoint, anyone can restore the base.
    """

    sums: bool = True
    tensors: bool = False

    name: ClassVar[str] = "edit"
    summary: ClassVar[str] = "the edit alone, for erasec apply and erasec combine"
    extras: ClassVar[frozenset[str]] = KINDS

    def size(self, model: Model) -> int:
        """An estimate for one concept: for each stream two factors and three sums of at most (d, d), d the width of its
        text states; with ``tensors``, also the weights that read text states."""
        sums = sum(5 * 8 * sites[0].shape[1] ** 2 for sites in model.streams.values())
        return sums + self.tensors * sum(4 * prod(site.shape) for sites in model.streams.values() for site in sites)

    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        concepts = (name for edit in model.edits for name in edit.concepts)
        path = out / f"{file_name(concepts) or self.name}{edit_file.SUFFIX}"
        merged = model.merged() if self.tensors else {}
        tensors = {f"{part}/{key}": make() for part, keys in merged.items() for key, make in keys.items()}
        edit_file.write_edits(path, model.edits, model.base_record(), self.sums, tensors)
        return Artifact(self.name, out, (read_back_check(model, path),))

    def compare(self, base: Model, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        paths = [path for path in out.rglob("*") if not path.is_dir()]
        if len(paths) != 1 or not paths[0].name.endswith(edit_file.SUFFIX):
            names = sorted(path.relative_to(out).as_posix() for path in paths)
            return (Check.count("edit/files", names or [edit_file.SUFFIX], "files where one edit file must be"),)
        (path,) = paths
        edited = replace(base, edits=edit_file.read_edits(path)[0])
        wrong, merged = [], edited.merged()
        for component in base.family.components:
            changed, stored = merged.get(component, {}), checkpoint.entries(component)
            for key, entry in base.entries(component).items():
                wanted = changed[key]() if key in changed else read_tensor(entry)
                if key not in stored or tensor_bytes(read_tensor(stored[key])) != tensor_bytes(wanted):
                    wrong.append(f"{component}/{key}")
        how = f"tensors of the base with this edit that are not the checkpoint's; {path.name}"
        return (
            Check.count("edit/merged", wrong, how),
            extras_check(gather_extras(edited.edits, read_extras(base.source.root)), read_extras(checkpoint.root)),
            stored_check(path, checkpoint),
        )


def read_back_check(model: Model, path: Path) -> Check:
    """Count what differs between the model's edits and those read from the file ``path``: merged weights and extras."""
    again = replace(model, edits=edit_file.read_edits(path)[0])
    sites = model.edited_sites
    different = [site.key for site in sites if not bool((model.merged_weight(site) == again.merged_weight(site)).all())]
    written, read = (gather_extras(view.edits) for view in (model, again))
    different += different_extras(written, read)
    how = f"differences after the file is read and merged again, of {len(sites)} edited tensors and "
    return Check.count("edit/again", different, how + f"{len(written.tensors)} tensors of extras")


def different_extras(one: Extras, other: Extras) -> list[str]:
    """The names of the tensors of extras that differ, and "the metadata of the extras" where their metadata do."""
    missing = one.tensors.keys() ^ other.tensors.keys()
    different = {key for key in one.tensors.keys() - missing if not one.tensors[key].equal(other.tensors[key])}
    metadata = [pack_extras(extras.memories, extras.tokens, extras.negative)[1] for extras in (one, other)]
    return sorted(missing | different) + ["the metadata of the extras"] * (metadata[0] != metadata[1])


def extras_check(edited: Extras, merged: Extras) -> Check:
    """Count the memories, tokens and negative prompts of the base with an edit that are not the checkpoint's."""
    how = "memories, tokens and negative prompts of the base with this edit that are not the checkpoint's"
    return Check.count("edit/extras", different_extras(edited, merged), how)


def stored_check(path: Path, checkpoint: Folder) -> Check:
    """Count the edited tensors in an edit file, which ``erasec relink`` writes as they are, that are not the
    checkpoint's."""
    stored, entries = read_header(path)[0], dict[str, Entry]()
    merged = {name.removeprefix(edit_file.MERGED): name for name in stored if name.startswith(edit_file.MERGED)}
    for component in {name.partition("/")[0] for name in merged} & checkpoint.index.keys():
        entries |= {f"{component}/{key}": entry for key, entry in checkpoint.entries(component).items()}
    wrong = [name for name, own in merged.items() if not _equal(stored[own], entries.get(name))]
    return Check.count("edit/tensors", wrong, f"of {len(merged)} tensors in it, those that are not the checkpoint's")


def _equal(stored: Entry, wanted: Entry | None) -> bool:
    if wanted is None or (stored.dtype, stored.shape) != (wanted.dtype, wanted.shape):
        return False
    return tensor_bytes(read_tensor(stored)) == tensor_bytes(read_tensor(wanted))
