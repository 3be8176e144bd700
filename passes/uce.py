"""UCE: unified concept editing in closed form.

Gandikota, Orgad, Belinkov, Materzynska, Bau: "Unified Concept Editing in Diffusion Models", WACV 2024,
arXiv:2308.14761. Cross-attention keys and values of the erased phrases become those of the anchor; kept phrases stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from erasec.errors import ErasecError
from erasec.rows import EMPTY, ClosedForm, goals, mean, pairs

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.concept import Concept
    from erasec.model import Model

ROWS = ("tail", "last")


@dataclass(frozen=True)
class Uce(ClosedForm):
    """``rows`` "tail" edits from the phrase's last token to the end, pads included, and keeps all states of a kept
    prompt (the 2023 code); "last" edits and keeps the last token of a phrase alone (the 2025 code)."""

    rows: str = "tail"

    name: ClassVar[str] = "uce"
    version: ClassVar[str] = "2"
    paper: ClassVar[str] = "arXiv:2308.14761"
    summary: ClassVar[str] = "closed-form remap of cross-attention keys and values; seconds, no training"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in ROWS:
            raise ErasecError(f"uce: option rows is {self.rows!r}", why=f"it takes {' or '.join(ROWS)}")

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return pairs(model, concept.prompts(concept.phrases), goals(concept, concept.phrases), self.rows, stream)

    def kept(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        if self.rows == "tail":
            return super().kept(model, concept, stream)
        prompts = [EMPTY, *concept.prompts(concept.keep)]
        rows, _ = pairs(model, prompts, prompts, "last", stream)
        return rows, mean(rows)
