"""UCE: unified concept editing in closed form.

Gandikota, Orgad, Belinkov, Materzynska, Bau: "Unified Concept Editing in Diffusion Models", WACV 2024,
arXiv:2308.14761. Cross-attention keys and values of the erased phrases become those of the anchor; kept phrases stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec import closed_form
from erasec.base import Context, Pass
from erasec.concept import Concept, Prompt
from erasec.edit import Edit, LowRank
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from erasec.family import Site
    from erasec.model import Model

ROWS = ("tail", "last")
EMPTY = Prompt("", "")


@dataclass(frozen=True)
class Uce(Pass):
    """Options: ``rows`` "tail" edits from the phrase's last token to the end, pads included (the 2023 code), "last"
    that token alone (the 2025 code); ``scale`` weighs the erased rows and ``keep`` the kept ones, each side a
    mean over its rows, so that neither depends on how many prompts there are; ``ridge`` is the regulariser in units of
    the Gram's mean diagonal."""

    name: ClassVar[str] = "uce"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2308.14761"
    summary: ClassVar[str] = "closed-form remap of cross-attention keys and values; seconds, no training"

    rows: str = "tail"
    scale: float = 1.0
    keep: float = 1.0
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ErasecError(f"uce: option rows is {self.rows!r}", why=f"it takes {' or '.join(ROWS)}")
        if self.scale <= 0 or self.keep < 0:
            raise ErasecError(f"uce: scale is {self.scale:g} and keep {self.keep:g}", why="scale > 0 and keep >= 0")

    def sites(self, model: Model) -> tuple[Site, ...]:
        return model.select("cross", "kv")

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        """Edits of rank at most the text width on every cross-attention K and V; ``right`` is shared by all of them."""
        prompts = concept.prompts(concept.phrases)
        goals = concept.prompts([concept.anchor] * len(concept.phrases)) if concept.anchor else [EMPTY] * len(prompts)
        erase = self._paired(model, prompts, goals)
        kept = model.encode(["", *(prompt.text for prompt in concept.prompts(concept.keep))]).states.flatten(0, 1)
        keep = closed_form.gram(kept, torch.full((len(kept),), 1.0 / len(kept), dtype=torch.float64))
        solution = closed_form.solve(erase, keep, self.ridge, keep_weight=self.keep)
        left, right = solution.left, solution.right
        deltas = {site: LowRank(model.weight(site) @ left, right) for site in self.sites(model)}
        params = {"rows": self.rows, "scale": self.scale, "keep": self.keep, "ridge": self.ridge}
        return Edit(
            deltas, self.name, concept.name, params, model.digest, {**solution.stats, "rows_kept": float(len(kept))}
        )

    def _paired(self, model: Model, prompts: list[Prompt], goals: list[Prompt]) -> closed_form.Rows:
        """Rows of prompts and goals aligned at the last token of their phrases; the longer tail is trimmed.

        The empty prompt has no phrase: its rows begin at its first end token. (The reference takes the start token,
        whose state is the same in every prompt and draws attention wherever it stands.)
        """
        states = [model.encode([prompt.text for prompt in side]).states for side in (prompts, goals)]
        ends = [model.last_tokens([prompt.upto for prompt in side]).clamp(min=1).tolist() for side in (prompts, goals)]
        left, right = [], []
        for source, goal, start, stop in zip(*states, *ends, strict=True):
            count = 1 if self.rows == "last" else len(source) - max(start, stop)
            left.append(source[start : start + count])
            right.append(goal[stop : stop + count])
        total = sum(len(part) for part in left)
        weight = torch.full((total,), self.scale / total, dtype=torch.float64)
        return closed_form.Rows(torch.cat(left), torch.cat(right), weight)
