"""RECE: reliable and efficient concept erasure.

Gong, Chen, Wei, Chen, Jiang: "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024,
arXiv:2407.12383. After a closed-form edit, the embedding that would bring the concept back is derived, also in closed
form, and erased in turn; again for some epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec.closed_form import solver as closed_form
from erasec.closed_form.base import ClosedForm, erased
from erasec.closed_form.solver import Solution, System
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class Rece(ClosedForm):
    """``epochs`` of deriving and erasing after the first edit; ``derive`` is the regulariser of the derived embeddings
    (lambda of equation 9), in units of the mean diagonal of sum W^T W if ``relative``, else as in the paper, where it
    is 0.1 or 1e-3. All states of a prompt are edited."""

    epochs: int = 2
    derive: float = 0.1

    name: ClassVar[str] = "rece"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2407.12383"
    summary: ClassVar[str] = "closed form, then the embeddings that would bring the concept back are erased too"
    when: ClassVar[str] = (
        "as uce, where words chosen to get around the edit count more than what else moves: what would bring "
        "the concept back is erased too"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 0 or self.derive <= 0:
            raise ErasecError(
                f"rece: epochs is {self.epochs}, derive {self.derive:g}", why="epochs >= 0 and derive > 0"
            )

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased(model, concept, "all", stream)

    def shared(self, model: Model) -> dict[str, Tensor]:
        """sum W^T W over the sites of each stream: the one time that the weights are touched."""
        found = super().shared(model)
        for stream, sites in model.streams.items():
            energy = torch.zeros(sites[0].shape[1], sites[0].shape[1], dtype=torch.float64)
            for site in sites:
                energy += closed_form.gram(model.weight(site))
            found[f"{stream}.energy"] = energy
        return found

    def solution(self, asked: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        """M of all epochs. Every step starts from the weights edited so far, so the maps multiply: M = M_0 M_1 ..."""
        first = super().solution(asked, stream, sums)
        if not len(first.right):  # nothing is to move, so nothing can be brought back
            return first
        energy, matrix, worst = sums[""][f"{stream}.energy"], first.matrix(), first.condition
        held = [asked.keep, asked.source]
        for _ in range(self.epochs):
            back = asked.source @ derived(energy, matrix, self.derive, self.relative).T
            step = super().solution(System(back, asked.target() - back, torch.cat(held)), stream, sums)
            matrix, worst = matrix @ step.matrix(), max(worst, step.condition)
            held.append(back)
        moved = matrix - torch.eye(len(matrix), dtype=torch.float64)
        return Solution(moved, torch.eye(len(matrix), dtype=torch.float64), first.ridge, worst)


def derived(energy: Tensor, matrix: Tensor, ridge: float, relative: bool = True) -> Tensor:
    """The map (d, d) from a token state c to the state c* whose edited projections are nearest to those of c before.

    Equation 9 with ``energy`` S0 = sum W0^T W0 and W = W0 M: c* = (lam I + M^T S0 M)^-1 M^T S0 c. As lam goes to 0 it
    becomes M^-1.
    """
    lam = ridge * float(energy.diagonal().mean()) if relative else ridge
    back = matrix.T @ energy
    system = back @ matrix
    system.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise ErasecError(
            "the derived embeddings cannot be solved for", fix="raise the option derive, or lower epochs",
            why=f"the edited weights are singular, and derive is {ridge:g}",
        )  # fmt: skip
    return torch.cholesky_solve(back, factor)
