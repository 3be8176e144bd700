"""Closed-form edits as the references compute them, written naively, and synthetic token states to run them on.

Per layer: targets projected one prompt at a time, outer products materialised and accumulated one by one, an explicit
inverse. What the references compute and throw away is left out. Everything is in the dtype of what is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from erasec.closed_form import Solution

NORM = 28.0
OWN = (5, 7)  # a concept's own tokens in its prompts, first and behind the last

Prompt = tuple[Tensor, Tensor, float]  # rows (t, d), the rows (t, d) whose projections they get, weight


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
    found = mean + torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) @ spread
    return NORM * found / found.norm(dim=1, keepdim=True)


def products(left: Tensor, right: Tensor) -> Tensor:
    """sum_i left_i right_i^T of rows (t, m) and (t, n), each product materialised."""
    if len(left) == 1:
        return torch.outer(left[0], right[0])
    return torch.bmm(left[:, :, None], right[:, None, :]).sum(0)


def normal_equation(
    weight: Tensor, rows: Iterable[Prompt], lam: float, cached: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """[lam W + sum s t c^T] [lam I + sum s c c^T]^-1 over (c, t, s), t (rows, d_out); ``cached`` sums are added."""
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
    """The edit of all 77 rows, then one epoch: the rows that would bring them back are derived and edited too."""
    current = [edited(weight, [(source, target, 1.0), kept], lam) for weight in weights]
    gram, cross = lam * torch.eye(source.shape[1], dtype=source.dtype), torch.zeros(())
    for old, new in zip(weights, current, strict=True):
        gram, cross = gram + new.T @ new, cross + new.T @ old
    back = (torch.inverse(gram) @ cross @ source.T).T
    return [edited(weight, [(back, target, 1.0), kept, (source, source, 1.0)], lam) for weight in current]


def mace_edited(
    weights: Sequence[Tensor], concepts: Sequence[tuple[Tensor, Tensor]], own: Sequence[Solution], kept: Prompt,
    lam: float,
) -> list[Tensor]:  # fmt: skip
    """Refinement with all rows but the concepts' own; then fusion of each concept's low-rank edit on all its rows."""
    around = [
        (context(one), context(goal), 1.0)
        for source, target in concepts
        for one, goal in zip(source, target, strict=True)
    ]
    found = []
    for weight in weights:
        refined = edited(weight, [*around, kept], lam)
        rows = [(kept[0], kept[0] @ refined.T, kept[2])]
        for (source, _), solution in zip(concepts, own, strict=True):
            alone = refined + (refined @ solution.left) @ solution.right
            rows += [(prompt, prompt @ alone.T, 1.0) for prompt in source]
        found.append(normal_equation(refined, rows, lam))
    return found


def context(prompt: Tensor) -> Tensor:
    """The rows of a prompt (..., 77, d) but for the concept's own."""
    return torch.cat([prompt[..., : OWN[0], :], prompt[..., OWN[1] :, :]], -2)
