"""UCE: unified concept editing in closed form.

Gandikota, Orgad, Belinkov, Materzynska, Bau: "Unified Concept Editing in Diffusion Models", WACV 2024,
arXiv:2308.14761. Cross-attention keys and values of the erased phrases become those of the anchor; kept phrases stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from erasec.closed_form import joint_attention as joint
from erasec.closed_form import solver as closed_form
from erasec.closed_form.base import EMPTY, ClosedForm, apart, erased, goals, mean, pairs
from erasec.errors import ErasecError
from erasec.model.edit import Edit, Remap

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

ROWS = ("tail", "last")
PLACES = ("text", "blocks")


@dataclass(frozen=True)
class Uce(ClosedForm):
    """``rows`` "tail" edits from the phrase's last token to the end, pads included, and keeps all states of a kept
    prompt (the 2023 code); "last" edits and keeps the last token of a phrase alone (the 2025 code).

    ``at`` "text" edits what reads the text states: cross-attention keys and values, or the context embedder and the
    pooled projection of sd3 and flux, through which all text goes. "blocks", for those two alone, edits the text's keys
    and values in every block instead, on what they read at a few times of seeded noise; several concepts then one after
    the other.
    """

    rows: str = "tail"
    at: str = "text"

    name: ClassVar[str] = "uce"
    version: ClassVar[str] = "2"
    paper: ClassVar[str] = "arXiv:2308.14761"
    summary: ClassVar[str] = "closed-form remap of cross-attention keys and values; seconds, no training"
    when: ClassVar[str] = "what has a name, such as an object, a person or a style; takes seconds, so the first to try"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ROWS:
            raise ErasecError(f"uce: option rows is {self.rows!r}", why=f"it takes {' or '.join(ROWS)}")
        if self.at not in PLACES:
            raise ErasecError(f"uce: option at is {self.at!r}", why=f"it takes {' or '.join(PLACES)}")
        if self.at == "blocks" and self.prior:
            raise ErasecError(
                "uce: a prior is given with at=blocks", why="a prior is of text states, not of what blocks read"
            )

    def sites(self, model: Model) -> tuple[Site, ...]:
        if self.at == "text":
            return super().sites(model)
        return tuple(site for site in model.sites if site.attn == "context" and site.proj in ("k", "v"))

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        if self.at == "text":
            yield from super().solve_all(model, concepts, context)
            return
        for concept in apart(concepts):
            edit = self._blocks(model, concept, context)
            model = model.with_edit(edit)
            yield edit

    def _blocks(self, model: Model, concept: Concept, context: Context) -> Edit:
        """One map for K and V of each block; each of the stats is the largest of all blocks."""
        kept = [EMPTY, *concept.prompts(concept.keep)]
        prompts, becomes = concept.prompts(concept.phrases), goals(concept, concept.phrases)
        deltas: dict[Site, Remap] = {}
        told: dict[str, float] = {}
        for block in joint.blocks(model, prompts, becomes, kept, self.rows, context.seed):
            weight = mean(block.source, self.scale * concept.scale)
            asked = closed_form.system(block.source, block.target, weight, block.keep, mean(block.keep))
            solution = self.solution(asked, "context", {})
            deltas |= dict.fromkeys(block.sites, Remap(*closed_form.reduced(solution.left, solution.right)))
            found = closed_form.stats(asked, solution)
            told = {key: max(value, told.get(key, value)) for key, value in found.items()}
        return Edit(deltas, self.name, concept.name, asdict(self), model.digest, told)

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased(model, concept, self.rows, stream)

    def kept(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        if self.rows == "tail":
            return super().kept(model, concept, stream)
        prompts = [EMPTY, *concept.prompts(concept.keep)]
        rows, _ = pairs(model, prompts, prompts, "last", stream)
        return rows, mean(rows)
