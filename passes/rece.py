"""RECE: reliable and efficient concept erasure.

Gong, Chen, Wei, Chen, Jiang: "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024,
arXiv:2407.12383. After a closed-form edit, the embedding that would bring the concept back is derived, also in closed
form, and erased as well. This is repeated for some epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from erasec.closed_form import solver
from erasec.closed_form.base import ClosedForm
from erasec.closed_form.solver import Solution, System
from erasec.closed_form.token_rows import erased_rows
from erasec.errors import ErasecError
from erasec.model.threads import LAPACK, fixed_threads
from erasec.options import options

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@options
class Rece(ClosedForm):
    """RECE. After the first edit come ``epochs`` rounds of deriving embeddings and erasing them. ``derive`` is the
    regulariser of the derived embeddings (lambda of equation 9), in units of the mean diagonal of sum W^T W if
    ``relative``, else absolute as in the paper. All text states of a prompt are edited.

    The defaults are the published settings for objects that are easily erased: lambda 0.1, one epoch, and kept states
    with a tenth of the weight of erased ones. The paper has 1e-3 for styles and for other objects, and three epochs for
    nudity; the family sd1 has a table of these. The published 0.1 for the ridge of the edit is absolute; for the 77
    states of one prompt of Stable Diffusion 1.4, whose norm is about 28, it is 1.3e-3 in the unit of ``ridge``.
    """

    keep: Annotated[float, Field(ge=0)] = 0.1
    epochs: Annotated[int, Field(ge=0)] = 1
    derive: Annotated[float, Field(gt=0)] = 0.1

    name: ClassVar[str] = "rece"
    paper: ClassVar[str] = "arXiv:2407.12383"
    summary: ClassVar[str] = "closed form, then the embeddings that would bring the concept back are erased too"
    limits: ClassVar[str] = (
        "What the denoiser can draw stays in place, so that learned embeddings may bring the concept back. Its rows "
        "depend on the weights, so that the published weights and the recipe hardly lead to the inverse."
    )
    when: ClassVar[str] = (
        "as uce, where it matters more that no chosen words get around the edit than that nothing else changes: the "
        "embeddings that would bring the concept back are erased too"
    )

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, "all", stream)

    def shared_sums(self, model: Model) -> dict[str, Tensor]:
        """Besides the prior, the energy sum W^T W (d, d) over the sites of each stream. Weights are read only here."""

        import torch

        sums = super().shared_sums(model)
        for stream, sites in model.streams.items():
            energy = torch.zeros(sites[0].shape[1], sites[0].shape[1], dtype=torch.float64)
            for site in sites:
                energy += solver.gram(model.weight(site))
            sums[f"{stream}.energy"] = energy
        return sums

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        """M of all epochs. Each epoch starts from the weights edited so far, so the maps multiply: M = M_0 M_1 ..."""

        import torch

        first = super().solve_system(system, stream, sums)
        if not len(first.right):  # the concept does not change, so no embedding brings it back
            return first
        energy, matrix, condition = sums[""][f"{stream}.energy"], first.matrix(), first.condition
        kept = [system.keep, system.source]
        for _ in range(self.epochs):
            derived = system.source @ derive_map(energy, matrix, self.derive, self.relative).T
            epoch = System(derived, system.target() - derived, torch.cat(kept))
            solution = super().solve_system(epoch, stream, sums)
            matrix, condition = matrix @ solution.matrix(), max(condition, solution.condition)
            kept.append(derived)
        change = matrix - torch.eye(len(matrix), dtype=torch.float64)
        return Solution(change, torch.eye(len(matrix), dtype=torch.float64), first.ridge, condition)


@fixed_threads(LAPACK)
def derive_map(energy: Tensor, matrix: Tensor, ridge: float, relative: bool = True) -> Tensor:
    """The map (d, d) from a text state c to the state c* that brings it back: the projections of c* by the edited
    weights W are nearest to those of c by the original weights W0.

    Equation 9 with ``energy`` S0 = sum W0^T W0 and W = W0 M, M = ``matrix``: c* = (lam I + M^T S0 M)^-1 M^T S0 c. As
    lam goes to 0, the map becomes M^-1. ``ridge`` is lam, in units of the mean diagonal of S0 if ``relative``. Raises
    ErasecError where the system is singular.
    """

    import torch

    lam = ridge * float(energy.diagonal().mean()) if relative else ridge
    right_side = matrix.T @ energy
    left_side = right_side @ matrix
    left_side.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(left_side)
    if int(info):
        raise ErasecError(
            "the derived embeddings cannot be solved for",
            fix="raise the option derive, or lower epochs",
            why=f"the edited weights are singular, and derive is {ridge:g}",
        )
    return torch.cholesky_solve(right_side, factor)
