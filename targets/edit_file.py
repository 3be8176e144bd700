"""Target edit: the edits alone, as one small file for ``erasec apply`` and ``erasec combine``."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, EditTarget
from erasec.checkpoint.safetensors import read_tensor, tensor_bytes
from erasec.checkpoint.staging import file_name
from erasec.model import edit_file
from erasec.model.memory import pack_extras
from erasec.model.sidecar import KINDS, gather_extras
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
        (path,) = out.iterdir()
        edited = replace(base, edits=edit_file.read_edits(path)[0])
        wrong, merged = [], edited.merged()
        for component in base.family.components:
            changed, stored = merged.get(component, {}), checkpoint.entries(component)
            for key, entry in base.entries(component).items():
                wanted = changed[key]() if key in changed else read_tensor(entry)
                if key not in stored or tensor_bytes(read_tensor(stored[key])) != tensor_bytes(wanted):
                    wrong.append(f"{component}/{key}")
        how = f"tensors of the base with this edit that are not the checkpoint's; {path.name}"
        return (Check.count("edit/merged", wrong, how),)


def read_back_check(model: Model, path: Path) -> Check:
    """Count what differs between the model's edits and those read from the file ``path``: merged weights and extras."""
    again = replace(model, edits=edit_file.read_edits(path)[0])
    sites = model.edited_sites
    different = [site.key for site in sites if not bool((model.merged_weight(site) == again.merged_weight(site)).all())]
    written, read = (gather_extras(view.edits) for view in (model, again))
    missing = written.tensors.keys() ^ read.tensors.keys()
    different += sorted(
        missing | {key for key in written.tensors.keys() - missing if not written.tensors[key].equal(read.tensors[key])}
    )
    metadata = [pack_extras(extras.memories, extras.tokens, extras.negative)[1] for extras in (written, read)]
    different += ["the metadata of the extras"] * (metadata[0] != metadata[1])
    how = f"differences after the file is read and merged again, of {len(sites)} edited tensors and "
    return Check.count("edit/again", different, how + f"{len(written.tensors)} tensors of extras")
