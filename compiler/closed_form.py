"""One shared-matrix solver for every closed-form edit of cross-attention.

For token states c (erased), v (what they become) and k (kept), every site l of the family

    W'_l = [lam W_l + sum s W_l v c^T + sum p W_l k k^T] [lam I + sum s c c^T + sum p k k^T]^-1      (UCE, eq. 7)

has the same right factor, because each target is W_l times something:

    G = lam I + C S C^T + K P K^T,     W'_l = W_l M,     M = I + (V - C) S C^T G^-1 = I + D E.

So one Gram, one Cholesky and one d x d solve serve all sites; D and E are the edit. All of it runs in float64: the
per-layer float32 form cancels the big part of W and loses up to a tenth of the edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erasec.errors import ErasecError

# Beyond this, float64 leaves fewer than four good digits of the edit.
MAX_CONDITION = 1e12


@dataclass(frozen=True)
class Rows:
    """Token states as rows: ``source`` (n, d) become ``target`` (n, d), each with a weight (n,)."""

    source: Tensor
    target: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if self.source.shape != self.target.shape or self.weight.shape != self.source.shape[:1]:
            raise ValueError(f"rows {self.source.shape}, targets {self.target.shape}, weights {self.weight.shape}")


@dataclass(frozen=True)
class Solution:
    """M = I + left @ right, with left (d, r) and right (r, d) in float64; the edit of W is (W @ left) @ right."""

    left: Tensor
    right: Tensor
    stats: dict[str, float]

    def matrix(self) -> Tensor:
        """M itself, (d, d)."""
        return torch.eye(self.left.shape[0], dtype=torch.float64) + self.left @ self.right


def gram(states: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i x_i x_i^T over rows x_i: (n, d), (n,) -> (d, d), float64."""
    states = states.double()
    return states.T @ (states * weight.double()[:, None])


def solve(erase: Rows, keep: Tensor, ridge: float, keep_weight: float = 1.0, relative: bool = True) -> Solution:
    """Solve for the shared matrix.

    ``keep`` (d, d) is the ``gram`` of the states that must not move: they enter nowhere else, however many they are.
    ``keep_weight`` scales it in the solve, and not in the drift that is reported.
    ``ridge`` is lam; when ``relative`` it is in units of the mean diagonal of the weighted Gram, so that it means the
    same for every text encoder. Raises ErasecError when the system is too ill-conditioned for float64.
    """
    source, target, weight = erase.source.double(), erase.target.double(), erase.weight.double()
    width = source.shape[1]
    if ridge < 0:
        raise ErasecError(f"ridge is {ridge}", why="the regulariser must not be negative", fix="ridge=0.01")
    keep = keep.double()
    system = gram(source, weight) + keep_weight * keep
    lam = ridge * float(system.diagonal().mean()) if relative else ridge
    system = system + lam * torch.eye(width, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(system)
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    condition = highest / lowest if lowest > 0 else float("inf")
    if not condition < MAX_CONDITION:
        raise ErasecError(
            f"the closed-form system is ill-conditioned (condition number {condition:.1e})",
            why=f"the erased and kept states span too little of {width} dimensions, and ridge is {ridge:g}",
            fix="raise the option ridge, or give the concept more keep phrases",
        )
    # X = sum s (v - c) c^T = left @ core, and M - I = X G^-1 = left @ (core G^-1), by Cholesky. The rank is X's own: a
    # rank read off after the solve would count what its conditioning stirs up.
    left, core = factors((target - source).T @ (source * weight[:, None]))
    right = torch.cholesky_solve(core.T, torch.linalg.cholesky(system)).T
    matrix = torch.eye(width, dtype=torch.float64) + left @ right
    singular = torch.linalg.svdvals(matrix)
    stats = {
        "condition": condition,
        "ridge": lam,
        "rank": float(left.shape[1]),
        "sigma_min": float(singular[-1]),
        "sigma_max": float(singular[0]),
        "erased_residual": relative_error(source @ matrix.T, target, target - source, weight),
        "keep_drift": drift(matrix, keep),
        "rows_erased": float(len(source)),
    }
    return Solution(left, right, stats)


def factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """left (d, r) and right (r, d) with left @ right = matrix, r its numerical rank; signs fixed, so runs agree."""
    u, s, vh = torch.linalg.svd(matrix)
    rank = int((s > s[0] * matrix.shape[0] * torch.finfo(torch.float64).eps).sum()) if s[0] > 0 else 0
    signs = vh[:rank].gather(1, vh[:rank].abs().argmax(1, keepdim=True)).sign()
    return u[:, :rank] * s[:rank] * signs.T, vh[:rank] * signs


def drift(matrix: Tensor, keep: Tensor) -> float:
    """Root mean square of M k - k over that of k, for the states k whose Gram is ``keep``; 0 for no states."""
    moved = matrix - torch.eye(len(matrix), dtype=torch.float64)
    total = float(keep.trace())
    return (max(0.0, float((moved @ keep @ moved.T).trace())) / total) ** 0.5 if total > 0 else 0.0


def relative_error(found: Tensor, wanted: Tensor, scale: Tensor, weight: Tensor) -> float:
    """Weighted root mean square of found - wanted over that of ``scale``; 0 for no rows."""
    total = float((weight[:, None] * scale.pow(2)).sum())
    return (float((weight[:, None] * (found - wanted).pow(2)).sum()) / total) ** 0.5 if total > 0 else 0.0
