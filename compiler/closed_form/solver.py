"""One shared-matrix solver for every closed-form edit of cross-attention.

For token states c (erased), v (what they become) and k (kept), every site l of the family

    W'_l = [lam W_l + sum s W_l v c^T + sum p W_l k k^T] [lam I + sum s c c^T + sum p k k^T]^-1      (UCE, eq. 7)

has the same right factor, because each target is W_l times something:

    G = lam I + C S C^T + K P K^T,     W'_l = W_l M,     M = I + (V - C) S C^T G^-1 = I + D E.

So one Gram, one Cholesky and one d x d solve serve all sites; D and E are the edit. All of it runs in float64: the
per-layer float32 form cancels the big part of W and loses up to a tenth of the edit. A bias of a site moves nothing
here: W c + b -> W v + b asks for W' c = W v.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasec.errors import ErasecError

# Beyond this, float64 leaves fewer than four good digits of the edit.
MAX_CONDITION = 1e12


@dataclass(frozen=True)
class System:
    """What one or more concepts ask for, as weighted rows in float64; systems of concepts add up.

    ``source`` (n, d) holds sqrt(s) c, ``shift`` (n, d) sqrt(s) (v - c), ``keep`` (m, d) sqrt(p) k. An orthogonal mix of
    the rows of source and shift together, or of keep, asks for the same; so a Gram is stored by a root of it, at most d
    rows. ``lost`` is what the rows dropped by ``compact`` add to sum s |v - c|^2.
    """

    source: Tensor
    shift: Tensor
    keep: Tensor
    lost: float = 0.0

    @property
    def width(self) -> int:
        return int(self.source.shape[1])

    def target(self) -> Tensor:
        """Rows sqrt(s) v, (n, d)."""
        return self.source + self.shift

    def compact(self) -> System:
        """The same system in at most d rows of each kind."""
        source, shift, keep, lost = self.source, self.shift, self.keep, self.lost
        if len(source) > self.width:
            q, source = torch.linalg.qr(source)
            shift = q.T @ self.shift
            lost += max(0.0, float(self.shift.pow(2).sum() - shift.pow(2).sum()))
        if len(keep) > self.width:
            keep = torch.linalg.qr(keep, mode="r").R
        return System(source, shift, keep, lost)


def system(source: Tensor, target: Tensor, weight: Tensor, keep: Tensor, keep_weight: Tensor) -> System:
    """A system from token states: ``source`` (n, d) become ``target`` with weights (n,), ``keep`` (m, d) stay."""
    if source.shape != target.shape or weight.shape != source.shape[:1] or keep_weight.shape != keep.shape[:1]:
        raise ValueError(f"rows {source.shape}, targets {target.shape}, weights {weight.shape}, keep {keep.shape}")
    root, kept = weight.double().sqrt()[:, None], keep_weight.double().sqrt()[:, None]
    return System(root * source.double(), root * (target.double() - source.double()), kept * keep.double())


def joint(systems: Iterable[System]) -> System:
    """One system that asks for what all of them ask for."""
    every = tuple(systems)
    source, shift, keep = (torch.cat([getattr(one, name) for one in every]) for name in ("source", "shift", "keep"))
    return System(source, shift, keep, sum(one.lost for one in every))


@dataclass(frozen=True)
class Solution:
    """M = I + left @ right, with left (d, r) and right (r, d) in float64; the edit of W is (W @ left) @ right."""

    left: Tensor
    right: Tensor
    ridge: float
    condition: float

    def matrix(self) -> Tensor:
        """M itself, (d, d)."""
        return torch.eye(self.left.shape[0], dtype=torch.float64) + self.left @ self.right


def gram(rows: Tensor) -> Tensor:
    """sum_i x_i x_i^T over rows x_i: (n, d) -> (d, d), float64."""
    rows = rows.double()
    return rows.T @ rows


def weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i x_i x_i^T over rows x_i: (n, d), (n,) -> (d, d), float64."""
    return gram(rows.double() * weight.double().sqrt()[:, None])


def root(gram: Tensor) -> Tensor:
    """Rows (r, d) whose Gram is ``gram`` (d, d), r its numerical rank."""
    values, vectors = torch.linalg.eigh(gram.double())
    there = values > values[-1].clamp(min=0) * len(gram) * torch.finfo(torch.float64).eps
    rows: Tensor = values[there].sqrt()[:, None] * vectors[:, there].T
    return rows


def solve(asked: System, ridge: float, keep_weight: float = 1.0, relative: bool = True) -> Solution:
    """Solve for the shared matrix.

    ``ridge`` is lam; when ``relative`` it is in units of the mean diagonal of the weighted Gram, so that it means the
    same for every text encoder; else it is absolute, as in the papers. ``keep_weight`` scales the kept rows. Fewer rows
    than dimensions are solved by the push-through identity, C^T (lam I + A A^T)^-1 in place of (lam I + A^T A)^-1 C^T.
    Raises ErasecError when the system is too ill-conditioned for float64.
    """
    source, shift = asked.source, asked.shift
    if ridge < 0:
        raise ErasecError(f"ridge is {ridge}", why="the regulariser must not be negative", fix="ridge=0.01")
    rows = torch.cat([source, asked.keep * keep_weight**0.5])
    lam = ridge * float(rows.pow(2).sum()) / asked.width if relative else ridge
    few = len(rows) < asked.width
    if not shift.any():
        return Solution(shift[:0].T, source[:0], lam, 1.0)
    # All other directions of a d x d system with few rows have the eigenvalue lam.
    factor, condition = _factor(rows @ rows.T if few else rows.T @ rows, lam, lam if few else None, asked.width, ridge)
    if few:
        unit = torch.eye(len(rows), len(source), dtype=torch.float64)
        return Solution(shift.T, torch.cholesky_solve(unit, factor).T @ rows, lam, condition)
    if len(source) < asked.width:
        return Solution(shift.T, torch.cholesky_solve(source.T, factor).T, lam, condition)
    moved = torch.cholesky_solve(source.T @ shift, factor).T
    return Solution(moved, torch.eye(asked.width, dtype=torch.float64), lam, condition)


def fuse(
    rights: Sequence[Tensor], grams: Sequence[Tensor], keep: Tensor, ridge: float, relative: bool = True
) -> tuple[list[Tensor], float]:
    """Right factors of low-rank edits that act together as each does alone on its own states (MACE, equation 8).

    Edit i is W -> W + B_i A_i with A_i (r_i, d) in ``rights`` and the Gram K_i (d, d) of its states in ``grams``; what
    minimises sum_i |(W' - W - B_i A_i) states_i|^2 + |(W' - W) keep|^2 + lam |W' - W|^2 is W' = W + sum_i B_i A'_i with
    A'_i = A_i K_i [lam I + sum K + keep]^-1. Returns the A'_i, and the condition number of the system.
    """
    total = sum(grams, start=keep.double())
    lam = ridge * float(total.diagonal().mean()) if relative else ridge
    factor, condition = _factor(total.clone(), lam, None, len(total), ridge)
    fused = [torch.cholesky_solve((right @ gram).T, factor).T for right, gram in zip(rights, grams, strict=True)]
    return fused, condition


def _factor(matrix: Tensor, lam: float, other: float | None, width: int, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor and condition number of ``matrix`` + lam I, added in place; ``other`` is one more eigenvalue."""
    matrix.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    highest, lowest = (1.0, 0.0) if int(info) else _extremes(matrix, factor)
    if other is not None:
        highest, lowest = max(highest, other), min(lowest, other)
    condition = highest / lowest if lowest > 0 else float("inf")
    if not condition < MAX_CONDITION:
        raise ErasecError(
            f"the closed-form system is ill-conditioned (condition number {condition:.1e})",
            why=f"the erased and kept states span too little of {width} dimensions, and ridge is {ridge:g}",
            fix="raise the option ridge, give the concept more keep phrases, or give a prior",
        )
    return factor, condition


def _extremes(matrix: Tensor, factor: Tensor, steps: int = 12) -> tuple[float, float]:
    """Largest and smallest eigenvalue of a positive matrix, by power iteration with it and with its Cholesky factor.

    Both are reached from within, so the condition number is never said to be worse than it is; blocks of 4 vectors come
    within a few percent.
    """
    start = torch.linspace(-1, 1, 4 * len(matrix), dtype=torch.float64).cos().mul(7919).sin().reshape(len(matrix), 4)
    high, low = (start, start)
    for _ in range(steps):
        high = torch.linalg.qr(matrix @ high).Q
        low = torch.linalg.qr(torch.cholesky_solve(low, factor)).Q
    return float((matrix @ high).norm(dim=0).max()), float((matrix @ low).norm(dim=0).min())


def stats(asked: System, solution: Solution) -> dict[str, float]:
    """How healthy an edit is: conditioning, singular range of M, what is left of the erased, how far the kept moved.

    ``erased_residual`` is rms |M c - v| over rms |v - c|, ``keep_drift`` rms |M k - k| over rms |k|, both as weighted
    in the system; ``sigma_min`` near 0 says that M can hardly be undone, ``sigma_max`` how much it can amplify.
    """
    left, right = solution.left, solution.right
    moved = (asked.source @ right.T) @ left.T - asked.shift
    wanted = float(asked.shift.pow(2).sum()) + asked.lost
    kept = float(asked.keep.pow(2).sum())
    drift = float(((asked.keep @ right.T) @ left.T).pow(2).sum())
    low, high = singular_range(left, right)
    return {
        "condition": solution.condition,
        "ridge": solution.ridge,
        "rank": float(left.shape[1]),
        "sigma_min": low,
        "sigma_max": high,
        "erased_residual": ((float(moved.pow(2).sum()) + asked.lost) / wanted) ** 0.5 if wanted else 0.0,
        "keep_drift": (drift / kept) ** 0.5 if kept else 0.0,
    }


def singular_range(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Smallest and largest singular value of I + left @ right; those outside the span of the factors are 1."""
    width, rank = left.shape
    if 2 * rank >= width:
        values = torch.linalg.svdvals(torch.eye(width, dtype=torch.float64) + left @ right)
        return float(values[-1]), float(values[0])
    basis = torch.linalg.qr(torch.cat([left, right.T], 1)).Q
    core = torch.eye(basis.shape[1], dtype=torch.float64) + (basis.T @ left) @ (right @ basis)
    values = torch.cat([torch.linalg.svdvals(core), torch.ones(1, dtype=torch.float64)])
    return float(values.min()), float(values.max())


def reduced(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """The same product from the fewest columns: its numerical rank, singular values below ``tolerance`` of the largest
    left out. Signs are fixed, so runs agree."""
    if not len(right):
        return left, right
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    there = s > s[0] * tolerance
    u, s, vh = u[:, there], s[there], vh[there]
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return q_left @ (u * s * signs.T), (signs * vh) @ q_right.T
