"""MACE: mass concept erasure, its two closed forms.

Lu, Wang, Li, Liu, Kong: "MACE: Mass Concept Erasure in Diffusion Models", CVPR 2024, arXiv:2403.06135. First the
concept is removed from the text states of the words around it (closed-form refinement, on all tokens except its own).
Then each concept gets a low-rank edit for its own tokens, and these edits are fused so that they do not disturb each
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from erasec.closed_form import solver
from erasec.closed_form.base import ClosedForm, pack_system, unpack_system, without_conflicts
from erasec.closed_form.solver import Solution, System
from erasec.closed_form.token_rows import erased_rows, uniform_weights
from erasec.errors import ErasecError
from erasec.model.edit import Edit, LowRank
from erasec.model.edit_file import read_edits
from erasec.model.sidecar import describe, gather_extras
from erasec.options import options
from erasec.recipe.goals import first_disputed, recorded_goals

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@options
class Mace(ClosedForm):
    """MACE. The paper trains each concept's low-rank edit on attention maps; here it is closed-form too: the concept's
    own tokens become the last token of its anchor. ``own`` weighs these rows; with 0 only the refinement is done.

    ``edits`` names edit files, one for each concept, separated by ";". Their changes, made by any pass, are then fused
    instead.

    The published ridge is 0 with a prior of millions of captions, and 10, 100 or 1000 for objects without one, chosen
    for each; the default is that of ``ClosedForm``. The published weights of the prior belong to its size.
    """

    own: Annotated[float, Field(ge=0)] = 1.0
    edits: str = ""

    name: ClassVar[str] = "mace"
    paper: ClassVar[str] = "arXiv:2403.06135"
    summary: ClassVar[str] = "closed-form refinement of the words around concepts, then fusion of their own edits"
    when: ClassVar[str] = "many concepts in one model, or edits of other passes that are to be fused"

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        if not self.edits:
            yield from super().solve_all(model, concepts, context)
            return
        given = self._read_given_edits(model, concepts)
        for edit in replace(self, own=0.0, edits="").solve_all(model, concepts, context):
            model = model.with_edit(edit)
            yield replace(edit, params=asdict(self), sums={})
        yield self._fuse_given_edits(model, without_conflicts(concepts), given)

    def _read_given_edits(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Edit]:
        """The edits of the files in ``edits``, by concept. Raises ErasecError unless there is exactly one for each of
        ``concepts``, made for this model and changing only weights that read text."""
        paths = [Path(name.strip()).expanduser() for name in self.edits.split(";") if name.strip()]
        edits = [(path, edit) for path in paths for edit in read_edits(path)[0]]
        by_concept = {edit.concepts[0]: edit for _, edit in edits if len(edit.concepts) == 1}
        wanted = sorted(concept.name for concept in concepts)
        names = [name for _, edit in edits for name in edit.concepts]
        if len(edits) != len(by_concept) or sorted(by_concept) != wanted:
            raise ErasecError(
                f"mace: the edit files erase {', '.join(names) or 'nothing'}",
                why=f"one edit is needed for each of {', '.join(wanted)}",
                fix="make one for each concept C: erasec build MODEL --erase C --pass P --target edit",
            )
        readable = {site for sites in model.streams.values() for site in sites}
        for path, edit in edits:
            if edit.base and edit.base != model.digest:
                raise ErasecError(f"mace: {path.name} was made for another model", fix="make it for this model")
            if kinds := gather_extras([edit]).kinds:
                raise ErasecError(
                    f"mace: {path.name} has {describe(kinds)}",
                    why="only changes of weights can be fused",
                    fix="make that edit again with another pass",
                )
            if not edit.deltas:
                raise ErasecError(f"mace: {path.name} changes no weight", fix="make that edit again with another pass")
            if others := [site for site in edit.deltas if site not in readable]:
                raise ErasecError(
                    f"mace: {path.name} changes {others[0].key}",
                    why="this tensor does not read text states, and only edits of those that do can be fused",
                )
        for name, edit in by_concept.items():
            erased = [phrase for concept in concepts if concept.name != name for phrase in concept.phrases]
            if goal := first_disputed(recorded_goals(edit.phrases.get(name, {}), name), erased):
                raise ErasecError(
                    f"mace: the given edit of {name} makes it {goal!r}, which is erased too",
                    why=f"prompts for {name} would draw what another of the concepts should not show",
                    fix="make that edit again with a concept file whose anchor stays",
                )
        return by_concept

    def _fuse_given_edits(self, model: Model, concepts: Sequence[Concept], given: Mapping[str, Edit]) -> Edit:
        """W + sum_i B_i A_i K_i [lam I + sum_i K_i + P]^-1 at every site, where W is refined already (equation 8)."""

        import torch

        shared = self.shared_sums(model)
        deltas: dict[Site, LowRank] = {}
        worst_condition = 1.0
        for stream, sites in model.streams.items():
            prior = shared.get(f"{stream}.prior", torch.zeros(0, sites[0].shape[1]))
            keep = self.keep * self.prior_weight * solver.gram(prior)
            grams = []
            for concept in concepts:
                states = _prompt_states(model, concept, stream)
                grams.append(solver.weighted_gram(states, uniform_weights(states, self.scale * concept.scale)))
                keep += self.keep * solver.weighted_gram(*self.kept_rows(model, concept, stream))
            for site in sites:
                weight = model.weight(site)
                unchanged = (weight[:, :0], weight[:0])
                edits = [given[concept.name].deltas.get(site) for concept in concepts]
                factors = [delta.factors(weight) if delta else unchanged for delta in edits]
                rights, condition = solver.fuse([right for _, right in factors], grams, keep, self.ridge, self.relative)
                worst_condition = max(worst_condition, condition)
                if len(fused := torch.cat(rights)):
                    deltas[site] = LowRank(torch.cat([left for left, _ in factors], 1), fused)
        names = tuple(sorted(given))
        return Edit(deltas, self.name, names, model.digest, asdict(self), stats={"condition": worst_condition})

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, "context", stream)

    def concept_sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """Besides the system of the refinement, one for the concept's own tokens. Its kept rows are all text states of
        the concept's prompts."""
        sums = super().concept_sums(model, concept)
        scale = self.scale * concept.scale
        for stream in model.streams:
            source, target = erased_rows(model, concept, "words", stream)
            states = _prompt_states(model, concept, stream)
            weight, states_weight = uniform_weights(source, self.own * scale), uniform_weights(states, scale)
            own = solver.weighted_system(source, target, weight, states, states_weight).compact()
            sums |= pack_system(own, f"{stream}.own")
        return sums

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        """M_refined (I + sum_i N_i K_i [lam I + sum_i K_i + P]^-1): equation 8 for all sites at once.

        I + N_i is the map for concept i's own tokens, K_i the Gram matrix of all text states of its prompts, and P that
        of the kept states.
        """

        import torch

        refined = super().solve_system(system, stream, sums)
        names = sorted(name for name in sums if name)
        if not self.own:
            return refined
        edits, grams = [], []
        for name in names:
            own = unpack_system(sums[name], f"{stream}.own")
            alone = System(own.source, own.shift, system.keep)
            edits.append(solver.solve(alone, self.ridge, self.keep, self.relative))
            grams.append(solver.gram(own.keep))
        kept = self.keep * solver.gram(system.keep)
        rights, condition = solver.fuse([edit.right for edit in edits], grams, kept, self.ridge, self.relative)
        identity = torch.eye(system.width, dtype=torch.float64)
        fused = sum((edit.left @ right for edit, right in zip(edits, rights, strict=True)), start=identity)
        matrix = refined.matrix() @ fused
        return Solution(matrix - identity, identity, refined.ridge, max(refined.condition, condition))


def _prompt_states(model: Model, concept: Concept, stream: str) -> Tensor:
    """All text states (n, d) of the concept's prompts."""
    texts = [prompt.text for prompt in concept.prompts(concept.phrases)]
    return model.encode(texts, stream).states.flatten(0, 1)
