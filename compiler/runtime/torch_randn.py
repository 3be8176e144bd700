"""The normal numbers of torch's CPU generator, without torch: the same seed is the same picture everywhere."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from erasec.errors import ErasecError

Array = NDArray[np.float32]
BLOCK = 16


def normal(seed: int, shape: tuple[int, ...]) -> Array:
    """``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` in float32, to some 5e-7.

    torch draws 24 bits a number from MT19937 and turns blocks of 16 into 8 cosines and 8 sines (Box-Muller); where the
    size is no multiple of 16, the last 16 are drawn anew. Raises ErasecError below 16, which are drawn otherwise.
    """
    size = math.prod(shape)
    if size < BLOCK:
        raise ErasecError(f"{size} numbers of noise cannot be drawn", why=f"it takes at least {BLOCK}")
    source = np.random.RandomState(seed & 0xFFFFFFFF)  # torch seeds it with the low half of the number
    uniform, whole = _uniform(source, size), size - size % BLOCK
    drawn = np.empty(size, np.float32)
    drawn[:whole] = _box_muller(uniform[:whole])
    if whole < size:
        drawn[-BLOCK:] = _box_muller(_uniform(source, BLOCK))
    return drawn.reshape(shape)


def _uniform(source: np.random.RandomState, count: int) -> Array:
    bits = source.randint(0, 2**32, count, dtype=np.uint32) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: Array) -> Array:
    blocks = uniform.reshape(-1, BLOCK)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, : BLOCK // 2]))
    angle = np.float32(2 * np.pi) * blocks[:, BLOCK // 2 :]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
