"""MACE: mass concept erasure, its two closed forms.

Lu, Wang, Li, Liu, Kong: "MACE: Mass Concept Erasure in Diffusion Models", CVPR 2024, arXiv:2403.06135. First the words
around a concept are made to carry nothing of it (closed-form refinement, on all tokens but its own); then each
concept's own low-rank edit, of its own tokens, is fused with the others so that they do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec.closed_form import solver as closed_form
from erasec.closed_form.base import ClosedForm, apart, erased, mean, pack, unpack
from erasec.closed_form.solver import Solution, System
from erasec.errors import ErasecError
from erasec.model import edit as edits_
from erasec.model.edit import Edit, LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class Mace(ClosedForm):
    """The paper trains each concept's low-rank edit on attention maps; here it is closed-form too: the concept's own
    tokens become the last token of its anchor. ``own`` weighs these rows; 0 leaves the refinement alone.

    ``edits`` are edit files, one for each concept, separated by ";": their changes, of whatever pass, are then fused in
    place of these.
    """

    own: float = 1.0
    edits: str = ""

    name: ClassVar[str] = "mace"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2403.06135"
    summary: ClassVar[str] = "closed-form refinement of the words around concepts, then fusion of their own edits"
    when: ClassVar[str] = "many concepts in one model, or edits of other passes that are to be fused"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own < 0:
            raise ErasecError(f"mace: own is {self.own:g}", why="own >= 0")

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        if not self.edits:
            yield from super().solve_all(model, concepts, context)
            return
        given = self._given(model, concepts)
        for edit in replace(self, own=0.0, edits="").solve_all(model, concepts, context):
            model = model.with_edit(edit)
            yield replace(edit, params=asdict(self), sums={})
        yield self._fused(model, apart(concepts), given)

    def _given(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Edit]:
        """The one edit of each concept, by its name. Raises ErasecError where the files are not for these."""
        paths = [Path(name.strip()).expanduser() for name in self.edits.split(";") if name.strip()]
        every = [(path, edit) for path in paths for edit in edits_.read(path)[0]]
        found = {edit.concept: edit for _, edit in every}
        wanted = sorted(concept.name for concept in concepts)
        if len(every) != len(found) or sorted(found) != wanted:
            raise ErasecError(
                f"mace: the edit files erase {', '.join(edit.concept for _, edit in every) or 'nothing'}",
                why=f"one edit is needed for each of {', '.join(wanted)}",
                fix="erasec build MODEL --erase C --pass P --target edit   makes one for C",
            )
        readable = {site for sites in model.streams.values() for site in sites}
        for path, edit in every:
            if edit.base and edit.base != model.digest:
                raise ErasecError(f"mace: {path.name} was made for another model", fix="make it on this one")
            if other := [site for site in edit.deltas if site not in readable]:
                raise ErasecError(f"mace: {path.name} changes {other[0].key}", why="only what reads text can be fused")
        return found

    def _fused(self, model: Model, concepts: Sequence[Concept], given: Mapping[str, Edit]) -> Edit:
        """W + sum_i B_i A_i K_i [lam I + sum_i K_i + P]^-1 at every site (equation 8), W refined."""
        shared = self.shared(model)
        deltas: dict[Site, LowRank] = {}
        worst = 1.0
        for stream, sites in model.streams.items():
            prior = shared.get(f"{stream}.prior", torch.zeros(0, sites[0].shape[1]))
            keep = self.keep * self.prior_weight * closed_form.gram(prior)
            grams = []
            for concept in concepts:
                every = _states(model, concept, stream)
                grams.append(closed_form.weighted_gram(every, mean(every, self.scale * concept.scale)))
                keep += self.keep * closed_form.weighted_gram(*self.kept(model, concept, stream))
            for site in sites:
                weight = model.weight(site)
                none = (weight[:, :0], weight[:0])
                parts = [
                    given[concept.name].deltas[site].factors(weight) if site in given[concept.name].deltas else none
                    for concept in concepts
                ]
                own = [right for _, right in parts]
                rights, condition = closed_form.fuse(own, grams, keep, self.ridge, self.relative)
                worst = max(worst, condition)
                if len(fused := torch.cat(rights)):
                    deltas[site] = LowRank(torch.cat([left for left, _ in parts], 1), fused)
        names = ", ".join(sorted(given))
        return Edit(deltas, self.name, names, asdict(self), model.digest, {"condition": worst})

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased(model, concept, "context", stream)

    def sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """Beside the refinement's system: that of the own tokens, and all states of the concept's prompts."""
        found = super().sums(model, concept)
        scale = self.scale * concept.scale
        for stream in model.streams:
            source, target = erased(model, concept, "words", stream)
            every = _states(model, concept, stream)
            weight = mean(source, self.own * scale)
            own = closed_form.system(source, target, weight, every, mean(every, scale)).compact()
            found |= pack(own, f"{stream}.own")  # kept here are the states of the concept's own prompts
        return found

    def solution(self, asked: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        """M_refined (I + sum_i N_i K_i [lam I + sum_i K_i + P]^-1), with N_i concept i's own edit, K_i the Gram of all
        states of its prompts and P that of what is kept (equation 8, all sites at once)."""
        refined = super().solution(asked, stream, sums)
        names = sorted(name for name in sums if name)
        if not self.own:
            return refined
        edits = []
        for name in names:
            own = unpack(sums[name], f"{stream}.own")
            alone = System(own.source, own.shift, asked.keep)
            edits.append(closed_form.solve(alone, self.ridge, self.keep, self.relative))
        grams = [closed_form.gram(unpack(sums[name], f"{stream}.own").keep) for name in names]
        kept = self.keep * closed_form.gram(asked.keep)
        rights, condition = closed_form.fuse([edit.right for edit in edits], grams, kept, self.ridge, self.relative)
        identity = torch.eye(asked.width, dtype=torch.float64)
        fused = sum((edit.left @ right for edit, right in zip(edits, rights, strict=True)), start=identity)
        matrix = refined.matrix() @ fused
        return Solution(matrix - identity, identity, refined.ridge, max(refined.condition, condition))


def _states(model: Model, concept: Concept, stream: str) -> Tensor:
    """All token states (n, d) of the concept's prompts."""
    texts = [prompt.text for prompt in concept.prompts(concept.phrases)]
    return model.encode(texts, stream).states.flatten(0, 1)
