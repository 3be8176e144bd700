"""UCE: unified concept editing in closed form.

Gandikota, Orgad, Belinkov, Materzynska, Bau: "Unified Concept Editing in Diffusion Models", WACV 2024,
arXiv:2308.14761. Cross-attention keys and values of the erased phrases become those of the anchor; kept phrases stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar, Literal

from erasec.closed_form import solver
from erasec.closed_form.base import ClosedForm, without_conflicts
from erasec.closed_form.joint_attention import block_rows
from erasec.closed_form.token_rows import EMPTY, erased_rows, goal_prompts, row_pairs, uniform_weights
from erasec.errors import ErasecError
from erasec.model.edit import Edit, Remap
from erasec.options import options

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@options
class Uce(ClosedForm):
    """UCE. ``rows`` chooses the text states: "tail" edits those from the phrase's last token to the end, padding
    included, and keeps all states of a kept prompt (the code of 2023); "last" edits and keeps only the last token of
    each phrase (the code of 2025).

    ``at`` chooses the matrices: "text" edits those that read the text states, which are the cross-attention keys and
    values, or in sd3 and flux the context embedder and the pooled projection. "blocks", only for sd3 and flux, edits
    the text keys and values of every block instead, on their inputs at a few noise levels of seeded noise; several
    concepts are then solved one after the other.

    The defaults are those of the code of 2023, which the paper describes. Its weights of up to ten kept prompts, one
    divided by their number, add up to the weight of one erased prompt, as a scale and a keep of 1 do. For the ridge see
    ``ClosedForm``.
    """

    rows: Literal["tail", "last"] = "tail"
    at: Literal["text", "blocks"] = "text"

    name: ClassVar[str] = "uce"
    version: ClassVar[str] = "2"
    paper: ClassVar[str] = "arXiv:2308.14761"
    summary: ClassVar[str] = "closed-form remap of cross-attention keys and values; seconds, no training"
    when: ClassVar[str] = "what has a name, such as an object, a person or a style; takes seconds, so the first to try"

    def __post_init__(self) -> None:
        if self.at == "blocks" and self.prior:
            raise ErasecError(
                "uce: a prior is given with at=blocks",
                why="a prior holds text states, and the matrices of blocks have other inputs",
                fix="leave out the prior, or use at=text",
            )

    def sites(self, model: Model) -> tuple[Site, ...]:
        if self.at == "text":
            return super().sites(model)
        return tuple(site for site in model.sites if site.attn == "context" and site.proj in self.matrices)

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        if self.at == "text":
            yield from super().solve_all(model, concepts, context)
            return
        for concept in without_conflicts(concepts):
            edit = self._solve_blocks(model, concept, context)
            model = model.with_edit(edit)
            yield edit

    def _solve_blocks(self, model: Model, concept: Concept, context: Context) -> Edit:
        """One map for K and V of each block. The stats are the largest of all blocks."""
        kept = [EMPTY, *concept.prompts(concept.keep)]
        prompts, goals = concept.prompts(concept.phrases), goal_prompts(concept, concept.phrases)
        deltas: dict[Site, Remap] = {}
        largest: dict[str, float] = {}
        for block in block_rows(model, prompts, goals, kept, self.rows, context.seed):
            weight = uniform_weights(block.source, self.scale * concept.scale)
            keep_weight = uniform_weights(block.keep)
            system = solver.weighted_system(block.source, block.target, weight, block.keep, keep_weight)
            solution = self.solve_system(system, "context", {})
            chosen = [site for site in block.sites if site.proj in self.matrices]
            deltas |= dict.fromkeys(chosen, Remap(*solver.reduce_rank(solution.left, solution.right)))
            stats = solver.stats(system, solution)
            largest = {name: max(value, largest.get(name, value)) for name, value in stats.items()}
        phrases = {concept.name: concept.record}
        return Edit(deltas, self.name, (concept.name,), model.digest, asdict(self), stats=largest, phrases=phrases)

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, self.rows, stream)

    def kept_rows(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        if self.rows == "tail":
            return super().kept_rows(model, concept, stream)
        prompts = [EMPTY, *concept.prompts(concept.keep)]
        rows, _ = row_pairs(model, prompts, prompts, "last", stream)
        return rows, uniform_weights(rows)
