"""The number of threads that torch computes with. It is fixed, because sums of floating-point numbers depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

THREADS = 4  # networks and products of matrices: the same bits for this number on any number of cores
LAPACK = 1  # decompositions: with several threads, the library may choose another order of sums in every run


@contextmanager
def fixed_threads(count: int = THREADS) -> Iterator[None]:
    """Compute with ``count`` threads in the block, or in the function that this decorates, whatever OMP_NUM_THREADS and
    the number of cores are. Sets the number of the whole process, and restores it afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
