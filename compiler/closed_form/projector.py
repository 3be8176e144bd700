"""Oblique projectors: edits W' = W M whose M has no inverse, because it removes directions of the text states for good.

For functionals F (d, m) the matrix M = I - A (F^T A)^-1 F^T with A = S^-1 F, S = sum_l W_l^T W_l over the sites l, has
F^T M = 0: no text state x reaches an output W_l M x with a part along F. Of all such M it changes the outputs of the
sites least. F = (S^-1 / s + p K^T K / g)^-1 U^T is large along the directions U (m, d) of a concept and small on the
kept states K. The mean diagonals s of S^-1 and g of K^T K make p weigh retention against robustness alike for every
text encoder. All matrices are float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasec.closed_form.solver import Solution, System, gram, reduce_rank
from erasec.errors import ErasecError
from erasec.model.threads import LAPACK, fixed_threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# Added to the metric, relative to its mean diagonal: outputs of a site say nothing about directions it does not read.
REGULAR = 1e-4
# Functionals that depend on others up to this part, in squares, are left out.
DEPENDENT = 1e-10


@fixed_threads(LAPACK)
def metric_root(weights: Iterable[Tensor]) -> Tensor:
    """An upper triangular root R (d, d) of the metric S = R^T R = sum_l W_l^T W_l + regulariser, float64.

    ``weights`` are the matrices (d_out, d) of the sites.
    """
    import torch

    metric = sum(gram(weight) for weight in weights)
    assert isinstance(metric, torch.Tensor)
    metric.diagonal().add_(REGULAR * float(metric.diagonal().mean()))
    root: Tensor = torch.linalg.cholesky(metric, upper=True)
    return root


@fixed_threads(LAPACK)
def difference_root(rows: Tensor, neutral: Tensor) -> Tensor:
    """At most d rows (n, d) with the same Gram matrix as ``rows`` (n, d) minus ``neutral`` (n, d), scaled to norm 1."""
    import torch

    difference = rows.double() - neutral.double()
    if len(difference) > difference.shape[1]:
        difference = torch.linalg.qr(difference, mode="r").R
    root: Tensor = difference / difference.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return root


@fixed_threads(LAPACK)
def directions(difference: Tensor, count: int) -> Tensor:
    """The ``count`` orthonormal directions (m, d) along which the rows of ``difference`` (n, d) lie most; at most as
    many as its numerical rank.
    """
    import torch

    _, values, vectors = torch.linalg.svd(difference, full_matrices=False)
    chosen: Tensor = vectors[: min(count, int((values > values[:1] * 1e-8).sum()))]
    return chosen


def kept_weights(states: Tensor, removed: Tensor) -> Tensor:
    """Weights (n t,) of the kept states (n, t, d) of n prompts, which add up to 1.

    A prompt weighs by the size of its states along the directions ``removed`` (m, d), relative to the mean of all
    prompts at the same place: a neighbour of the concept loses most, and so counts most.
    """
    import torch

    states = states.double()
    along = (states - states.mean(0)) @ removed.T
    energy = along.square().sum((1, 2)) + torch.finfo(torch.float64).tiny  # of a single prompt it is 0
    weights: Tensor = (energy / energy.sum() / states.shape[1]).repeat_interleave(states.shape[1])
    return weights


@fixed_threads(LAPACK)
def project(system: System, removed: Tensor, metric: Tensor, keep_weight: float, ridge: float | None) -> Solution:
    """The map M = P (I + H F^T) that removes the directions ``removed`` (m, d) and leaves the other content.

    P is the projector of the module. Without a ``ridge`` H is 0. With one, the remaining content is guided to the
    targets of ``system``: H (d, m) is the least-squares solution of c + H F^T c = v for its rows and of H F^T k = 0 for
    its kept states, with a ridge in units of the mean diagonal of the normal matrix. F^T M stays 0. ``metric`` is the
    root that ``metric_root`` returns, and ``keep_weight`` is p. Raises ErasecError where nothing is left to remove.
    """
    import torch

    if not system.shift.any():  # a concept that becomes itself
        return Solution(system.shift[:0].T, system.source[:0], 0.0, 1.0)
    inverse = torch.cholesky_inverse(metric, upper=True)
    balance = inverse / inverse.diagonal().mean()
    kept = gram(system.keep)
    if float(kept.diagonal().mean()) > 0:
        balance = balance + kept * (keep_weight / float(kept.diagonal().mean()))
    values = torch.linalg.eigvalsh(balance)
    functionals = _independent(torch.linalg.solve(balance, removed.double().T), inverse)
    if not functionals.shape[1]:
        raise ErasecError(
            "the projector has no direction to remove",
            why="the concept's text states do not differ from those of its kept phrases",
            fix="give the concept other keep phrases, or another anchor if it has none",
        )
    # The functionals are orthonormal in the metric S^-1: F^T A = F^T S^-1 F = I.
    change = -(inverse @ functionals)
    if ridge is not None:
        seen = system.source @ functionals
        # Kept states are rows with a target of no change.
        normal = seen.T @ seen + functionals.T @ kept @ functionals
        normal.diagonal().add_(ridge * float(normal.diagonal().mean()) + torch.finfo(torch.float64).tiny)
        guide = torch.linalg.solve(normal, seen.T @ system.shift).T
        change = change + guide + change @ (functionals.T @ guide)
    condition = float(values[-1] / values[0])
    return Solution(change, functionals.T.contiguous(), 0.0 if ridge is None else ridge, condition)


def _independent(functionals: Tensor, inverse: Tensor) -> Tensor:
    """The span of the columns ``functionals`` (d, m), as columns that are orthonormal in the metric ``inverse``."""
    import torch

    unit = functionals / functionals.norm(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(unit.T @ inverse @ unit)
    kept = values > values[-1:] * DEPENDENT
    basis: Tensor = unit @ (vectors[:, kept] / values[kept].sqrt())
    return basis


@fixed_threads(LAPACK)
def output_directions(
    weight: Tensor, differences: Tensor, kept: Tensor, heads: int, count: int, keep_weight: float
) -> Tensor:
    """For each attention head, orthonormal directions (heads, d_head, k) of its outputs that the concepts use most.

    ``weight`` (d_out, d) is that of a site, ``differences`` (n, d) are states of the concepts minus neutral ones, and
    ``kept`` (m, d) are the weighted kept states. As in the module's formula, the directions U of the concepts become
    (I + p Y^T Y / g)^-1 U^T with Y the outputs of the kept states, so that they are small on these. At most a quarter
    of a head's outputs is taken: k = min(count, d_head / 4), at least 1.
    """
    import torch

    parts = weight.double().reshape(heads, -1, weight.shape[1])
    size = parts.shape[1]
    left, _, _ = torch.linalg.svd(parts @ differences.T, full_matrices=False)
    wanted = left[:, :, : max(1, min(count, size // 4))]
    outputs = parts @ kept.T  # (heads, d_head, m)
    grams = outputs @ outputs.mT
    means = grams.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    balance = torch.eye(size, dtype=torch.float64) + keep_weight * grams / means[:, None, None]
    basis: Tensor = torch.linalg.qr(torch.linalg.solve(balance, wanted)).Q
    return basis


@fixed_threads(LAPACK)
def without_outputs(weight: Tensor, left: Tensor, right: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Factors B (d_out, r) and A (r, d) with W + B A = (I - Q Q^T) W M, float64.

    ``weight`` is W (d_out, d), M = I + ``left`` ``right`` with (d, m) and (m, d), and ``taken`` are the directions Q of
    each head.
    """
    import torch

    basis = torch.block_diag(*taken)  # (d_out, heads k)
    moved = weight.double() @ left
    inside = basis.T @ weight.double()
    # W L R - Q (Q^T W + Q^T W L R)
    return reduce_rank(torch.cat([moved, -basis], 1), torch.cat([right, inside + (basis.T @ moved) @ right]))
