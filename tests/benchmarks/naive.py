"""Closed-form edits as the references compute them, written naively, and synthetic token states to run them on.

Per layer: targets projected one prompt at a time, outer products materialised and accumulated one by one, an explicit
inverse. What the references compute and throw away is left out. Everything is in the dtype of what is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from erasec.closed_form.solver import Solution

NORM = 28.0
OWN = (5, 7)  # a concept's own tokens in its prompts, first and behind the last

# Rows (n, d) or (t, n, d), see ``products``; the rows whose projections they get; weight.
Prompt = tuple[Tensor, Tensor, float]


@cache
def _shape(width: int) -> tuple[Tensor, Tensor]:
    """The states' mean (d,), of norm 1, and what turns white noise into their deviations, (d, d)."""
    draw = torch.Generator().manual_seed(width)
    scale = torch.arange(1, width + 1) ** -0.5
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    return basis[0], (scale / scale.norm())[:, None] * basis


def states(rows: int, width: int, seed: int) -> Tensor:
    """Synthetic token states (rows, width) in float32."""
    mean, spread = _shape(width)
    drawn = mean + torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) @ spread
    drawn *= NORM / drawn.norm(dim=1, keepdim=True)
    return drawn


def products(left: Tensor, right: Tensor) -> Tensor:
    """The product left^T right (m, d) of rows (n, m) and (n, d); of rows (t, n, .) the sum of t, all materialised."""
    return left.T @ right if left.dim() == 2 else torch.bmm(left.mT, right).sum(0)


def normal_equation(
    weight: Tensor, rows: Iterable[Prompt], lam: float, cached: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """[lam W + sum s t c^T] [lam I + sum s c c^T]^-1 over (c, t, s), rows t of d_out; ``cached`` sums are added."""
    top, gram = lam * weight, lam * torch.eye(weight.shape[1], dtype=weight.dtype)
    if cached:
        top, gram = top + cached[0], gram + cached[1]
    for source, target, scale in rows:
        top += scale * products(target, source)
        gram += scale * products(source, source)
    return top @ torch.inverse(gram)


def edited(weight: Tensor, prompts: Sequence[Prompt], lam: float) -> Tensor:
    """One site's edit: all targets are projected first, one prompt at a time, and kept."""
    return normal_equation(weight, [(source, target @ weight.T, scale) for source, target, scale in prompts], lam)


def rece_edited(weights: Sequence[Tensor], source: Tensor, target: Tensor, kept: Prompt, lam: float) -> list[Tensor]:
    """The edit of all rows (77, 1, d), then one epoch: rows that would bring them back are derived and edited too."""
    current = [edited(weight, [(source, target, 1.0), kept], lam) for weight in weights]
    gram, cross = lam * torch.eye(source.shape[-1], dtype=source.dtype), torch.zeros(())
    for old, new in zip(weights, current, strict=True):
        gram, cross = gram + new.T @ new, cross + new.T @ old
    back = source @ (torch.inverse(gram) @ cross).T
    return [edited(weight, [(back, target, 1.0), kept, (source, source, 1.0)], lam) for weight in current]


def null_space_edited(weight: Tensor, source: Tensor, target: Tensor, keep: Tensor, rho: float, hold: float) -> Tensor:
    """W + W (A - T) P (T P + rho I)^-1: SPEED without filter and augmentation, with the sums T of c c^T and A of v c^T.

    P are the directions with at most the share ``hold`` of the kept rows' squared lengths; it is computed for each
    site, as the reference does.
    """
    values, vectors = torch.linalg.eigh(products(keep, keep) / len(keep))
    free = vectors[:, values <= hold * values.sum()]
    projector, eye = free @ free.T, torch.eye(len(values), dtype=weight.dtype)
    gram, cross = torch.zeros_like(eye), torch.zeros_like(eye)
    for c, v in zip(source.split(1), target.split(1), strict=True):
        gram += products(c, c)
        cross += products(v, c)
    return weight + weight @ (cross - gram) @ projector @ torch.inverse(gram @ projector + rho * eye)


def mace_edited(
    weights: Sequence[Tensor],
    concepts: Sequence[tuple[Tensor, Tensor]],
    own: Sequence[Solution],
    kept: Prompt,
    lam: float,
) -> list[Tensor]:
    """Refinement with all rows but the concepts' own; then fusion of each concept's low-rank edit on all its rows.

    ``concepts`` are prompts (77, n, d) and their goals, so that an outer product is of one place in all n prompts.
    """
    around = [(context(source), context(target), 1.0) for source, target in concepts]
    solved = []
    for weight in weights:
        refined = edited(weight, [*around, kept], lam)
        rows = [(kept[0], kept[0] @ refined.T, kept[2])]
        for (source, _), solution in zip(concepts, own, strict=True):
            alone = refined + (refined @ solution.left) @ solution.right
            rows.append((source, source @ alone.T, 1.0))
        solved.append(normal_equation(refined, rows, lam))
    return solved


def context(prompts: Tensor) -> Tensor:
    """The rows of prompts (77, ...) but for the concept's own."""
    return torch.cat([prompts[: OWN[0]], prompts[OWN[1] :]])
