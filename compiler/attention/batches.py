"""Batches that fit into memory: where one is too large, its half is tried."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from erasec.errors import ErasecError, is_out_of_memory

T = TypeVar("T")

FIX = "free memory, use another --device, or paint no pictures: --pictures 0"


def in_batches(count: int, most: int, run: Callable[[int, int], T]) -> Iterator[T]:
    """``run(start, stop)`` for consecutive ranges of ``count`` items, each of at most ``most``.

    Where a range runs out of memory, its first half is tried, and no later range is larger. Raises ErasecError where
    one item does not fit.
    """
    start = 0
    while start < count:
        size = min(most, count - start)
        result: T | None = None
        try:
            result = run(start, start + size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                why = "the memory of the device does not hold one of them"
                raise ErasecError("a picture cannot be painted", why=why, fix=FIX) from error
        if result is None:  # outside of the except block, whose traceback holds on to the tensors
            most = max(1, size // 2)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += size
        yield result
