"""Target edit: what was changed, as one small file for ``erasec apply`` and ``erasec combine``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, EditTarget, file_name
from erasec.model import edit as edits
from erasec.model.edit import carried
from erasec.model.sidecar import KINDS, gathered

if TYPE_CHECKING:
    from erasec.model.view import Model


@dataclass(frozen=True)
class EditFile(EditTarget):
    """``sums`` false leaves out what re-solving needs: a smaller file, which cannot be combined with others.
    ``tensors`` true adds the edited tensors as they are in the end, for ``erasec relink`` without the base.

    An edit file is the eraser and its inverse: whoever has it and the erased checkpoint has the base.
    """

    sums: bool = True
    tensors: bool = False

    name: ClassVar[str] = "edit"
    summary: ClassVar[str] = "the edit alone, for erasec apply and erasec combine"
    holds: ClassVar[frozenset[str]] = KINDS

    def size(self, model: Model) -> int:
        """Two factors and three sums of up to the text width squared for each stream, for one concept; with
        ``tensors``, what reads text states once more."""
        sums = sum(5 * 8 * sites[0].shape[1] ** 2 for sites in model.streams.values())
        return sums + self.tensors * sum(4 * prod(site.shape) for sites in model.streams.values() for site in sites)

    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        concepts = (name for edit in model.edits for name in edit.concept.split(", "))
        path = out / f"{file_name(concepts) or self.name}{edits.SUFFIX}"
        merged = model.merged() if self.tensors else {}
        tensors = {f"{part}/{key}": make() for part, keys in merged.items() for key, make in keys.items()}
        edits.write(path, model.edits, model.about(), self.sums, tensors)
        again = replace(model, edits=edits.read(path)[0])
        sites = [site for site in model.parameters if model.deltas(site)]
        wrong = [site.key for site in sites if not bool((model.merge(site) == again.merge(site)).all())]
        one, two = (gathered(view.edits) for view in (model, again))
        lost = one.tensors.keys() ^ two.tensors.keys()
        wrong += sorted(
            lost | {key for key in one.tensors.keys() - lost if not one.tensors[key].equal(two.tensors[key])}
        )
        told = (carried(each.memories, each.tokens, each.negative)[1] for each in (one, two))
        wrong += ["what is told of them"] * (next(told) != next(told))
        how = f"what is not the same when the file is read and merged again, of {len(sites)} edited tensors and "
        how += f"{len(one.tensors)} beside them"
        return Artifact(self.name, out, (Check("edit/again", float(len(wrong)), 0.0, not wrong, how),))
