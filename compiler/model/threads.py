"""The number of threads that torch computes with. It is fixed, because sums of floating-point numbers depend on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from erasec.errors import ErasecError

VARIABLE = "ERASEC_THREADS"
THREADS = 4  # networks and products of matrices: the same bits for this number on any number of cores
LAPACK = 1  # decompositions: with several threads, the library may choose another order of sums in every run


def chosen_threads() -> int:
    """The threads of networks and products: THREADS, or the number in ERASEC_THREADS, which may give other bits.

    Raises ErasecError where the variable is no number of threads.
    """
    text = os.environ.get(VARIABLE) or str(THREADS)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1024):
        raise ErasecError(f"{VARIABLE} is {text!r}", why="it is a number of threads, from 1 to 1024", fix="unset it")
    return int(text)


@contextmanager
def fixed_threads(count: int | None = None) -> Iterator[None]:
    """Compute with ``count`` threads in the block, or in the function that this decorates, by default with
    ``chosen_threads``, whatever OMP_NUM_THREADS and the number of cores are. Sets the number of the whole process, and
    restores it afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(chosen_threads() if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
