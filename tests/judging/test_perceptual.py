"""LPIPS: how the package is called, and what is said where it cannot be."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from erasec.judging import perceptual


class StandIn(torch.nn.Module):
    """In the place of lpips.LPIPS: keeps what it is given, and returns the mean squared difference as LPIPS does."""

    calls: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__()
        StandIn.made.append(options)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        StandIn.calls.append((a, b))
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandIn]:
    module = ModuleType("lpips")
    module.__spec__ = importlib.machinery.ModuleSpec("lpips", None)
    module.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    StandIn.calls, StandIn.made = [], []
    return StandIn


def test_the_package_gets_pairs_of_batches_in_its_range_and_layout(lpips: type[StandIn]) -> None:
    before = np.zeros((20, 6, 8, 3), dtype=np.uint8)
    after = before.copy()
    after[1] = 255
    after[:, 0, 0, 2] = 255  # the blue of one corner
    distances = perceptual.distances(before, after)
    assert lpips.made == [{"net": "alex", "verbose": False}]
    assert [tuple(a.shape) for a, _ in lpips.calls] == [(16, 3, 6, 8), (4, 3, 6, 8)]
    first, second = lpips.calls[0]
    assert first.dtype == torch.float32
    assert (first.min(), first.max(), second.min(), second.max()) == (-1, -1, -1, 1)
    assert second[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert distances.shape == (20,) and distances[1] == 4 and distances[0] == pytest.approx(4 / (6 * 8 * 3))


def test_equal_pictures_have_no_distance_and_none_have_none(lpips: type[StandIn]) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)
    assert perceptual.distances(pictures, pictures).tolist() == [0, 0, 0]
    assert perceptual.distances(pictures[:0], pictures[:0]).shape == (0,)


def test_what_is_missing_is_said_with_its_command(
    monkeypatch: pytest.MonkeyPatch, lpips: type[StandIn], tmp_path: Path
) -> None:
    assert perceptual.FETCH in perceptual.unavailable()
    weights = tmp_path / "hub" / "checkpoints"
    weights.mkdir(parents=True)
    (weights / "alexnet-owt-7be5be79.pth").touch()
    assert perceptual.unavailable() == ""
    monkeypatch.delitem(sys.modules, "lpips")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "erasec[lpips]"' in perceptual.unavailable()
    assert lpips.made == []  # nothing is loaded or fetched to find out
