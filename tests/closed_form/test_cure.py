"""CURE, on rows: what is removed, what is kept, and why several concepts are a product of their maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasec.closed_form import solver
from erasec.closed_form.base import pack_system
from erasec.closed_form.solver import System
from erasec.passes.cure import Cure

WIDTH = 40


def states(count: int, seed: int) -> Tensor:
    """Rows that share a direction, as text states do."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(1, WIDTH, generator=rng, dtype=torch.float64)
    return common + torch.randn(count, WIDTH, generator=rng, dtype=torch.float64)


C, K = states(10, 1), states(9, 2)
NONE = torch.zeros(0, WIDTH, dtype=torch.float64)


def matrix(*erased: Tensor, keep: Tensor = NONE, strength: float = 2.0, keep_strength: float = 2.0) -> Tensor:
    """M of concepts with the given rows each, and kept rows of the first one."""
    step = Cure(strength=strength, keep_strength=keep_strength)
    parts = [System(rows, -rows, NONE if number else keep) for number, rows in enumerate(erased)]
    sums = {f"{number:02}": pack_system(part, "context") for number, part in enumerate(parts)}
    return step.solve_system(solver.combine_systems(parts), "context", sums).matrix()


def gap(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("strength", [1.0, 2.0, 1e6])
def test_one_row_is_removed_whole_whatever_the_strength(strength: float) -> None:
    m = matrix(C[:1], strength=strength)
    assert float((m @ C[0]).norm() / C[0].norm()) < 1e-12
    assert gap(m @ m, m) < 1e-12
    # Of several rows more is removed with more strength, and applying it twice removes more.
    several = matrix(C, strength=strength)
    assert (gap(several @ several, several) > 1e-3) == (strength < 1e3)
    assert float((C @ several.T).norm() / C.norm()) < (1e-3 if strength > 1e3 else 1.0)


def test_what_is_kept_stays_as_the_strength_of_keeping_grows() -> None:
    drifts = [gap(K @ matrix(C, keep=K, keep_strength=strength).T, K) for strength in (2.0, 1e3, 1e6, 1e9)]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < 1e-6 < 1e-2 < drifts[0]


def test_neither_order_nor_uniform_repetition_counts() -> None:
    order = torch.randperm(len(C), generator=torch.Generator().manual_seed(3))
    whole = matrix(C, keep=K)
    assert gap(matrix(C[order], keep=K[order[order < len(K)]]), whole) < 1e-12
    assert gap(matrix(torch.cat([C, C]), keep=torch.cat([K, K])), whole) < 1e-12
    # Repeating some of the rows gives these more weight.
    assert gap(matrix(torch.cat([C, C[:3]]), keep=K), whole) > 1e-3


def test_several_concepts_are_the_product_of_their_maps_because_one_map_for_all_fades() -> None:
    rows = [C[[number]] for number in range(len(C))]
    product = torch.eye(WIDTH, dtype=torch.float64)
    for row in rows:
        product = matrix(row, keep=K, keep_strength=5.0) @ product
    # ``keep`` of the first concept alone is that of all.
    together = matrix(*rows, keep=K, keep_strength=5.0)
    assert gap(together, product) < 1e-12
    # Of n equal directions one map takes the share a / (n + a - 1) of each.
    apart = torch.eye(WIDTH, dtype=torch.float64)[:10]
    assert float((apart @ matrix(*apart[:, None]).T).norm()) < 1e-12
    assert gap(apart @ matrix(apart).T, apart * (1 - 2 / 11)) < 1e-12
