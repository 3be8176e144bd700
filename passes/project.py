"""Project: a closed-form edit that has no inverse.

The projector removes what tells a concept from neutral phrases out of the keys and values of cross-attention, for every
text state that there can be. Edits that map the concept's states to those of an anchor (UCE and its like) are
invertible matrices: their inverse follows from the published weights and the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from erasec.checkpoint.folder import head_count
from erasec.closed_form import projector, solver
from erasec.closed_form.base import ClosedForm, pack_system
from erasec.closed_form.projector import difference_root
from erasec.closed_form.solver import Solution, System
from erasec.closed_form.token_rows import erased_rows, neutral_rows, uniform_weights
from erasec.model.edit import Edit, LowRank, Remap
from erasec.options import options
from erasec.progress import note

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Context
    from erasec.closed_form.base import Sums
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

# The share of all directions from which a note says that the rest suffers. On the emoji world one object takes 1 % and
# costs little; ten take 10 %, and of the objects that should stay half are gone (docs/emoji.md).
CROWDED = 0.05


@options
class Project(ClosedForm):
    """A projector along the directions in which the concept's text states differ most from neutral ones.

    Neutral states are the mean of those of the kept phrases at the same places of the same prompts. ``directions`` is
    the number of directions for each concept. ``keep`` weighs what the kept phrases lose against how near a text state
    can come to the concept's outputs. Of the kept phrases those that lie most along these directions weigh most. With
    ``guide`` the erased prompts draw the anchor, else what is left of them.

    ``heads`` removes in addition that many directions for each concept from the values of each attention head, at most
    a quarter of a head's width: a text state that reaches the concept's outputs by another way does not find them. It
    applies to cross-attention with keys and values; the edit then depends on the weights, so that ``erasec combine``
    cannot solve it again. ``ridge`` regularises the guide, and ``relative`` has no effect.

    The projector is the least-change one of LEACE (Belrose et al., "LEACE: Perfect linear concept erasure in closed
    form", NeurIPS 2023), with the outputs of the edited matrices as its metric and kept text states in the place of a
    covariance. LEACE edits activations; nothing is published about it on diffusion models.
    """

    keep: Annotated[float, Field(ge=0)] = 0.3
    directions: Annotated[int, Field(ge=1)] = 2
    guide: bool = True
    heads: Annotated[int, Field(ge=0)] = 2

    name: ClassVar[str] = "project"
    paper: ClassVar[str] = "arXiv:2306.03819"
    summary: ClassVar[str] = "closed-form projector of cross-attention keys and values that has no inverse"
    when: ClassVar[str] = "what has a name, where the published weights must not lead back to it"
    limits: ClassVar[str] = (
        "No algebra undoes the projector, but text states that are trained for long, noised pictures and fine-tuning "
        "may bring the concept back. Every concept takes directions of the text states for good, so it is for few "
        "concepts: ten of them take half of what should stay in the emoji world, and fifty leave nothing of it."
    )

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, "tail", stream)

    def concept_sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """The system of the concept for each stream, and what tells it from neutral states in each part of the stream:
        states of two text encoders may have very different lengths."""
        sums: dict[str, Tensor] = {}
        for stream in model.streams:
            pairs = neutral_rows(model, concept, stream)
            own = {f"{stream}.difference{part}": difference_root(*pair) for part, pair in enumerate(pairs)}
            source, target = self.rows_to_erase(model, concept, stream)
            kept = model.encode(["", *(prompt.text for prompt in concept.prompts(concept.keep))], stream).states
            weights = projector.kept_weights(kept, self._removed(own, stream))
            system = solver.weighted_system(
                source, target, uniform_weights(source, self.scale * concept.scale), kept.flatten(0, 1), weights
            )
            sums |= pack_system(system.compact(), stream) | own
        return sums

    def _removed(self, sums: Sums, stream: str) -> Tensor:
        """The directions (m, d) to remove for one concept, from each part of a stream."""
        import torch

        return torch.cat([projector.directions(part, self.directions) for part in _differences(sums, stream)])

    def shared_sums(self, model: Model) -> dict[str, Tensor]:
        """Besides the prior, the root of the metric of each stream's sites."""
        metrics = {
            f"{stream}.metric": projector.metric_root(model.weight(site) for site in sites)
            for stream, sites in model.streams.items()
        }
        return super().shared_sums(model) | metrics

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Sums]) -> Solution:
        import torch

        removed = torch.cat([self._removed(sums[name], stream) for name in sorted(sums) if name])
        ridge = self.ridge if self.guide else None
        solution = projector.project(system, removed, sums[""][f"{stream}.metric"], self.keep, ridge)
        taken, width = solution.right.shape
        if taken > CROWDED * width:
            note(
                f"project removes {taken} of {width} directions of the text states, so that what is kept suffers too; "
                "erase fewer concepts at once, or choose another pass"
            )
        return solution

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """One edit that erases all concepts. It does not depend on their order."""
        (edit,) = super().solve_all(model, concepts, context)
        yield self._project_heads(model, edit) if self.heads else edit

    def _project_heads(self, model: Model, edit: Edit) -> Edit:
        """``edit`` with the directions of the concepts taken out of the values of each head."""
        import torch

        deltas = dict(edit.deltas)
        before, change = 0.0, 0.0  # of the values of kept states
        for stream, sites in model.streams.items():
            own = [edit.sums[name] for name in edit.concepts]
            difference = torch.cat([part for sums in own for part in _differences(sums, stream)])
            kept = torch.cat([sums[f"{stream}.keep"] for sums in own])
            if (prior := edit.sums[""].get(f"{stream}.prior")) is not None:
                kept = torch.cat([kept, prior * self.prior_weight**0.5])
            for site in sites:
                shared = edit.deltas.get(site)
                if (site.attn, site.proj) != ("cross", "v") or not isinstance(shared, Remap) or not shared.rank:
                    continue
                weight = model.weight(site)
                heads = head_count(model.source.config(site.component), site.key)
                count = self.heads * len(edit.concepts)
                taken = projector.output_directions(weight, difference, kept, heads, count, self.keep)
                left, right = projector.without_outputs(weight, shared.left, shared.right, taken)
                deltas[site] = LowRank(left, right)
                before += float((kept @ weight.double().T).square().sum())
                change += float(((kept @ right.T) @ left.T).square().sum())
        if deltas == edit.deltas:
            return edit
        # The sums alone no longer give the edit.
        stats = {**edit.stats, "value_drift": (change / before) ** 0.5 if before else 0.0}
        return replace(edit, deltas=deltas, stats=stats, sums={})


def _differences(sums: Sums, stream: str) -> list[Tensor]:
    """What tells a concept from neutral states in each part of a stream, from the sums of the concept."""
    start = f"{stream}.difference"
    return [sums[key] for key in sorted(sums) if key.startswith(start)]
