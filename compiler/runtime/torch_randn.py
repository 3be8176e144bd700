"""Normal random numbers of torch's CPU generator, without torch: a seed gives the same image in every runtime."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError

Array = NDArray[np.float32]
BLOCK = 16


def randn(seed: int, shape: tuple[int, ...]) -> Array:
    """``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` in float32, to about 5e-7.

    torch draws 24 bits per number from MT19937 and turns blocks of 16 into 8 cosines and 8 sines (Box-Muller). Where
    the size is no multiple of 16, it draws the last 16 again. Raises ErasecError for fewer than 16 numbers, which
    torch draws in another way.
    """
    size = math.prod(shape)
    if size < BLOCK:
        raise ErasecError(
            f"{size} numbers of noise cannot be drawn", why=f"torch draws fewer than {BLOCK} in another way"
        )
    rng = np.random.RandomState(seed & 0xFFFFFFFF)  # torch seeds MT19937 with the low 32 bits
    uniform, whole = _uniform(rng, size), size - size % BLOCK
    normal = np.empty(size, np.float32)
    normal[:whole] = _box_muller(uniform[:whole])
    if whole < size:
        normal[-BLOCK:] = _box_muller(_uniform(rng, BLOCK))
    return normal.reshape(shape)


def _uniform(rng: np.random.RandomState, count: int) -> Array:
    """Numbers (count,) in [0, 1)."""
    bits = rng.randint(0, 2**32, count, dtype=np.uint32) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: Array) -> Array:
    """Normal numbers from as many uniform ones, a multiple of 16."""
    blocks = uniform.reshape(-1, BLOCK)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, : BLOCK // 2]))
    angle = np.float32(2 * np.pi) * blocks[:, BLOCK // 2 :]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
