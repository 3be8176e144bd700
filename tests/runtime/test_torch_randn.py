"""Noise is that of torch's generator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from erasec.errors import ErasecError
from erasec.runtime.torch_randn import randn


@pytest.mark.parametrize("shape", [(16,), (1, 4, 8, 8), (3, 7, 5), (1, 4, 64, 64)])
def test_noise_is_torchs(shape: tuple[int, ...]) -> None:
    drawn = {}
    for seed in (0, 1, 42, 2**31 + 5, 2**32 - 1, 2**32 + 7, 2**63 - 25):
        theirs = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
        drawn[seed] = randn(seed, shape)
        assert drawn[seed].dtype == np.float32 and drawn[seed].shape == shape
        np.testing.assert_allclose(drawn[seed], theirs, rtol=0, atol=2e-6)
    for noise, other in itertools.combinations(drawn.values(), 2):
        assert np.abs(noise - other).max() > 0.1


def test_fewer_than_16_numbers_are_refused() -> None:
    with pytest.raises(ErasecError, match="15 numbers of noise"):
        randn(0, (3, 5))
