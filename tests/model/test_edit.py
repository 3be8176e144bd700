"""Edits as data: how they are merged into weights, and how they compose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasec.model.edit import Dense, LowRank, Remap, compose, merge


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_remaps_compose_in_their_order() -> None:
    maps = [Remap(draw(seed, 8, rank) / 4, draw(seed + 1, rank, 8) / 4) for seed, rank in ((0, 1), (10, 3), (20, 8))]
    weight, unit = draw(30, 5, 8), torch.eye(8, dtype=torch.float64)
    expected = weight
    for step in maps:
        expected = expected @ (unit + step.left @ step.right)
    one = compose(tuple(maps))
    assert torch.allclose(weight + one.change(weight), expected, atol=1e-12)
    assert torch.allclose(merge(weight, maps), expected, atol=1e-12)
    assert not torch.allclose(merge(weight, maps[::-1]), expected, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 30, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_merged_remap_is_the_float64_one_to_a_millionth_of_the_edit(rank: int, dtype: torch.dtype) -> None:
    weight = draw(0, 40, 64).to(dtype)
    step = Remap(draw(1, 64, rank) / 64**0.5, draw(2, rank, 64) / 64**0.5)
    expected = weight.double() + step.change(weight)
    merged = merge(weight, [step])
    assert merged.dtype == dtype
    if dtype == torch.float32:
        assert float((merged.double() - expected).norm() / (expected - weight.double()).norm()) < 1e-6
    else:  # the storage rounds more than the product does
        assert float((merged.double() - expected.to(dtype).double()).abs().max()) <= 2 * float(
            torch.finfo(dtype).eps * expected.abs().max()
        )


def test_each_delta_changes_the_weight_that_earlier_ones_made() -> None:
    weight = draw(0, 5, 8)
    steps = [LowRank(draw(1, 5, 2), draw(2, 2, 8)), Remap(draw(3, 8, 2), draw(4, 2, 8)), Dense(draw(5, 5, 8))]
    first = weight + steps[0].change(weight)
    expected = first + first @ steps[1].left @ steps[1].right + steps[2].change(first)
    assert torch.allclose(merge(weight, steps), expected, atol=1e-12)


def test_no_deltas_leave_the_weight_as_it_is() -> None:
    weight = draw(0, 3, 3).half()
    assert torch.equal(merge(weight, []), weight)
    nothing = Remap(draw(1, 3, 0), draw(2, 0, 3))
    assert torch.equal(merge(weight, [nothing]), weight)
    assert torch.equal(merge(weight, [nothing, nothing]), weight)
