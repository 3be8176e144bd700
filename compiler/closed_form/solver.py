"""One shared-matrix solver for every closed-form edit of cross-attention.

For token states c (erased), v (what they become) and k (kept), every site l of the family

    W'_l = [lam W_l + sum s W_l v c^T + sum p W_l k k^T] [lam I + sum s c c^T + sum p k k^T]^-1      (UCE, eq. 7)

has the same right factor, because each target is W_l times a text state:

    G = lam I + C S C^T + K P K^T,     W'_l = W_l M,     M = I + (V - C) S C^T G^-1 = I + D E.

So one Gram matrix, one Cholesky factor and one d x d solve serve all sites; D and E are the edit. All of it runs in
float64: the per-layer float32 form subtracts nearly equal matrices and loses up to a tenth of the edit. The bias b of a
site drops out: W' c + b = W v + b is W' c = W v.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.model.threads import LAPACK, fixed_threads

if TYPE_CHECKING:
    from torch import Tensor

# Beyond this, float64 leaves fewer than four correct digits of the edit.
MAX_CONDITION = 1e12


@dataclass(frozen=True)
class System:
    """The least-squares problem of one or more concepts, as weighted rows in float64. Systems of concepts add up.

    ``source`` (n, d) holds the rows sqrt(s) c, ``shift`` (n, d) sqrt(s) (v - c) and ``keep`` (m, d) sqrt(p) k. The
    solution does not change when source and shift are multiplied by the same orthogonal matrix from the left, or keep
    by one of its own. So ``compact`` can store at most d rows of each, a root of the Gram matrix; ``lost`` is the part
    of sum s |v - c|^2 that its dropped rows had.
    """

    source: Tensor
    shift: Tensor
    keep: Tensor
    lost: float = 0.0

    @property
    def width(self) -> int:
        return int(self.source.shape[1])

    def target(self) -> Tensor:
        """The rows sqrt(s) v, (n, d)."""
        return self.source + self.shift

    @fixed_threads(LAPACK)
    def compact(self) -> System:
        """An equivalent system with at most d rows of each kind."""

        import torch

        source, shift, keep, lost = self.source, self.shift, self.keep, self.lost
        if len(source) > self.width:
            q, source = torch.linalg.qr(source)
            shift = q.T @ self.shift
            lost += max(0.0, float(self.shift.pow(2).sum() - shift.pow(2).sum()))
        if len(keep) > self.width:
            keep = torch.linalg.qr(keep, mode="r").R
        return System(source, shift, keep, lost)


def weighted_system(source: Tensor, target: Tensor, weight: Tensor, keep: Tensor, keep_weight: Tensor) -> System:
    """A system from text states: the rows of ``source`` (n, d) become those of ``target`` (n, d), with weights (n,);
    the rows of ``keep`` (m, d) stay, with weights ``keep_weight`` (m,). Raises ValueError where these shapes do not
    match."""
    if source.shape != target.shape or weight.shape != source.shape[:1] or keep_weight.shape != keep.shape[:1]:
        raise ValueError(f"rows {source.shape}, targets {target.shape}, weights {weight.shape}, keep {keep.shape}")
    roots, keep_roots = weight.double().sqrt()[:, None], keep_weight.double().sqrt()[:, None]
    return System(roots * source.double(), roots * (target.double() - source.double()), keep_roots * keep.double())


def combine_systems(systems: Iterable[System]) -> System:
    """The sum of systems: one system with the rows of all of them."""

    import torch

    parts = tuple(systems)
    source, shift, keep = (torch.cat([getattr(part, name) for part in parts]) for name in ("source", "shift", "keep"))
    return System(source, shift, keep, sum(part.lost for part in parts))


@dataclass(frozen=True)
class Solution:
    """M = I + left @ right, with left (d, r) and right (r, d) in float64; the change of W is (W @ left) @ right.

    ``ridge`` is lam itself, absolute, and ``condition`` the condition number of the system.
    """

    left: Tensor
    right: Tensor
    ridge: float
    condition: float

    def matrix(self) -> Tensor:
        """M, (d, d) in float64."""

        import torch

        return torch.eye(self.left.shape[0], dtype=torch.float64) + self.left @ self.right


@fixed_threads(LAPACK)
def gram(rows: Tensor) -> Tensor:
    """The Gram matrix sum_i x_i x_i^T of the rows x_i: (n, d) -> (d, d), float64."""
    rows = rows.double()
    return rows.T @ rows


def weighted_gram(rows: Tensor, weight: Tensor) -> Tensor:
    """The Gram matrix sum_i weight_i x_i x_i^T of the rows x_i: (n, d), (n,) -> (d, d), float64."""
    return gram(rows.double() * weight.double().sqrt()[:, None])


@fixed_threads(LAPACK)
def gram_root(gram: Tensor) -> Tensor:
    """Rows (r, d) whose Gram matrix is ``gram`` (d, d), with r its numerical rank."""

    import torch

    values, vectors = torch.linalg.eigh(gram.double())
    nonzero = values > values[-1].clamp(min=0) * len(gram) * torch.finfo(torch.float64).eps
    rows: Tensor = values[nonzero].sqrt()[:, None] * vectors[:, nonzero].T
    return rows


@fixed_threads(LAPACK)
def solve(system: System, ridge: float, keep_weight: float = 1.0, relative: bool = True) -> Solution:
    """Solve for the shared matrix M.

    ``ridge`` is lam. If ``relative``, it is in units of the mean diagonal of the weighted Gram matrix, and so means the
    same for every text encoder; else it is absolute, as in the papers. ``keep_weight`` multiplies the weights of the
    kept rows. A system with fewer rows than dimensions is solved by the push-through identity, A^T (lam I + A A^T)^-1 =
    (lam I + A^T A)^-1 A^T for rows A, whose left side has the smaller inverse.

    Raises ErasecError where ``ridge`` is negative, or where the system is too ill-conditioned for float64.
    """

    import torch

    source, shift, width = system.source, system.shift, system.width
    if ridge < 0:
        raise ErasecError(f"ridge is {ridge}", why="the regulariser must not be negative", fix="raise the option ridge")
    rows = torch.cat([source, system.keep * keep_weight**0.5])
    lam = ridge * float(rows.pow(2).sum()) / width if relative else ridge
    few = len(rows) < width
    if not shift.any():
        return Solution(shift[:0].T, source[:0], lam, 1.0)
    # Few rows span few directions; in all others the d x d matrix has the eigenvalue lam.
    factor, condition = _factor(rows @ rows.T if few else rows.T @ rows, lam, lam if few else None, width, ridge)
    if few:
        unit = torch.eye(len(rows), len(source), dtype=torch.float64)
        return Solution(shift.T, torch.cholesky_solve(unit, factor).T @ rows, lam, condition)
    if len(source) < width:
        return Solution(shift.T, torch.cholesky_solve(source.T, factor).T, lam, condition)
    change = torch.cholesky_solve(source.T @ shift, factor).T
    return Solution(change, torch.eye(width, dtype=torch.float64), lam, condition)


@fixed_threads(LAPACK)
def fuse(
    rights: Sequence[Tensor], grams: Sequence[Tensor], keep: Tensor, ridge: float, relative: bool = True
) -> tuple[list[Tensor], float]:
    """Fuse low-rank edits so that each acts on its own text states as it does alone (MACE, equation 8).

    Edit i is W -> W + B_i A_i; ``rights`` holds A_i (r_i, d) and ``grams`` the Gram matrix K_i (d, d) of the text
    states that it is for. ``keep`` (d, d) is the Gram matrix P of the states that stay. The minimum of

        sum_i |(W' - W - B_i A_i) states_i|^2 + |(W' - W) kept states|^2 + lam |W' - W|^2

    is W' = W + sum_i B_i A'_i with A'_i = A_i K_i [lam I + sum_j K_j + P]^-1. Returns the A'_i and the condition number
    of the matrix in brackets. Raises ErasecError where that is too large for float64.
    """

    import torch

    total = sum(grams, start=keep.double())
    lam = ridge * float(total.diagonal().mean()) if relative else ridge
    factor, condition = _factor(total.clone(), lam, None, len(total), ridge)
    fused = [torch.cholesky_solve((right @ gram).T, factor).T for right, gram in zip(rights, grams, strict=True)]
    return fused, condition


def _factor(
    matrix: Tensor, lam: float, further_eigenvalue: float | None, width: int, ridge: float
) -> tuple[Tensor, float]:
    """Cholesky factor and condition number of ``matrix`` + lam I; lam is added in place.

    ``further_eigenvalue`` is one that the full system has and ``matrix``, its smaller form, does not.
    """

    import torch

    matrix.diagonal().add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    highest, lowest = (1.0, 0.0) if int(info) else _extreme_eigenvalues(matrix, factor)
    if further_eigenvalue is not None:
        highest, lowest = max(highest, further_eigenvalue), min(lowest, further_eigenvalue)
    condition = highest / lowest if lowest > 0 else float("inf")
    if not condition < MAX_CONDITION:
        raise ErasecError(
            f"the closed-form system is ill-conditioned (condition number {condition:.1e})",
            why=f"the erased and kept states span too few of the {width} dimensions, and ridge is {ridge:g}",
            fix="raise the option ridge, give the concept more keep phrases, or give a prior",
        )
    return factor, condition


def _extreme_eigenvalues(matrix: Tensor, factor: Tensor, iterations: int = 12) -> tuple[float, float]:
    """Largest and smallest eigenvalue of a positive matrix, by power iteration with it and with its Cholesky factor.

    The estimates approach both from inside the spectrum, so the condition number is at most underestimated; with blocks
    of 4 vectors, by a few percent.
    """

    import torch

    start = torch.linspace(-1, 1, 4 * len(matrix), dtype=torch.float64).cos().mul(7919).sin().reshape(len(matrix), 4)
    high, low = (start, start)
    for _ in range(iterations):
        high = torch.linalg.qr(matrix @ high).Q
        low = torch.linalg.qr(torch.cholesky_solve(low, factor)).Q
    return float((matrix @ high).norm(dim=0).max()), float((matrix @ low).norm(dim=0).min())


@fixed_threads(LAPACK)
def stats(system: System, solution: Solution) -> dict[str, float]:
    """Measurements of an edit: its conditioning, the range of its singular values, and how well it fits the system.

    ``erased_residual`` is rms |M c - v| over rms |v - c|, and ``keep_drift`` rms |M k - k| over rms |k|, both with the
    weights of the system. A ``sigma_min`` near 0 means that M can hardly be inverted; ``sigma_max`` is the most by
    which it lengthens a state.
    """
    left, right = solution.left, solution.right
    residual = (system.source @ right.T) @ left.T - system.shift
    shift = float(system.shift.pow(2).sum()) + system.lost
    kept = float(system.keep.pow(2).sum())
    drift = float(((system.keep @ right.T) @ left.T).pow(2).sum())
    low, high = singular_range(left, right)
    return {
        "condition": solution.condition,
        "ridge": solution.ridge,
        "rank": float(left.shape[1]),
        "sigma_min": low,
        "sigma_max": high,
        "erased_residual": ((float(residual.pow(2).sum()) + system.lost) / shift) ** 0.5 if shift else 0.0,
        "keep_drift": (drift / kept) ** 0.5 if kept else 0.0,
    }


def singular_range(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Smallest and largest singular value of I + left @ right; outside the span of the factors they are 1."""

    import torch

    width, rank = left.shape
    if 2 * rank >= width:
        values = torch.linalg.svdvals(torch.eye(width, dtype=torch.float64) + left @ right)
        return float(values[-1]), float(values[0])
    basis = torch.linalg.qr(torch.cat([left, right.T], 1)).Q
    core = torch.eye(basis.shape[1], dtype=torch.float64) + (basis.T @ left) @ (right @ basis)
    values = torch.cat([torch.linalg.svdvals(core), torch.ones(1, dtype=torch.float64)])
    return float(values.min()), float(values.max())


@fixed_threads(LAPACK)
def reduce_rank(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Factors of left @ right with as few columns as its numerical rank: singular values below ``tolerance`` times the
    largest are left out. The sign of each singular vector is fixed, so that all runs give the same factors."""

    import torch

    if not len(right):
        return left, right
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)  # it is not square where a matrix has few rows
    nonzero = s > s[0] * tolerance
    u, s, vh = u[:, nonzero], s[nonzero], vh[nonzero]
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return q_left @ (u * s * signs.T), (signs * vh) @ q_right.T
