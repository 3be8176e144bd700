"""MACE: mass concept erasure, its two closed forms.

Lu, Wang, Li, Liu, Kong: "MACE: Mass Concept Erasure in Diffusion Models", CVPR 2024, arXiv:2403.06135. First the words
around a concept are made to carry nothing of it (closed-form refinement, on all tokens but its own); then each
concept's own low-rank edit, of its own tokens, is fused with the others so that they do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec import closed_form
from erasec.closed_form import Solution, System
from erasec.errors import ErasecError
from erasec.rows import ClosedForm, goals, mean, pack, pairs, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.concept import Concept
    from erasec.model import Model


@dataclass(frozen=True)
class Mace(ClosedForm):
    """The paper trains each concept's low-rank edit on attention maps; here it is closed-form too: the concept's own
    tokens become the last token of its anchor. ``own`` weighs these rows; 0 leaves the refinement alone."""

    own: float = 1.0

    name: ClassVar[str] = "mace"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2403.06135"
    summary: ClassVar[str] = "closed-form refinement of the words around concepts, then fusion of their own edits"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own < 0:
            raise ErasecError(f"mace: own is {self.own:g}", why="own >= 0")

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return pairs(model, concept.prompts(concept.phrases), goals(concept, concept.phrases), "context", stream)

    def sums(self, model: Model, concept: Concept) -> dict[str, Tensor]:
        """Beside the refinement's system: that of the own tokens, and all states of the concept's prompts."""
        found = super().sums(model, concept)
        prompts, becomes = concept.prompts(concept.phrases), goals(concept, concept.phrases)
        scale = self.scale * concept.scale
        for stream in model.streams:
            source, target = pairs(model, prompts, becomes, "words", stream)
            every = model.encode([prompt.text for prompt in prompts], stream).states.flatten(0, 1)
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
