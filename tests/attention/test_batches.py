"""Batches: what does not fit into memory is halved, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from erasec.attention.batches import in_batches
from erasec.errors import ErasecError, is_out_of_memory

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.98 GB)"),
)


class Device:
    """Room for ``room`` items at once, and the ranges that it ran."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error = room, error
        self.tried: list[int] = []

    def run(self, start: int, stop: int) -> range:
        self.tried.append(stop - start)
        if stop - start > self.room:
            raise self.error
        return range(start, stop)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {str(error)[:8]}")
@pytest.mark.parametrize("room", [1, 3, 4, 100])
def test_every_item_is_run_once_in_its_order_whatever_fits(error: Exception, room: int) -> None:
    device = Device(room, error)
    ranges = list(in_batches(19, 8, device.run))
    assert [item for batch in ranges for item in batch] == list(range(19))
    assert max(map(len, ranges)) <= room
    refused = [size for size in device.tried if size > room]
    assert refused == {1: [8, 4, 2], 3: [8, 4], 4: [8], 100: []}[room]  # a size that failed is never tried again


def test_one_item_that_does_not_fit_is_a_sentence_that_says_what_to_do() -> None:
    with pytest.raises(ErasecError, match="cannot be painted") as caught:
        list(in_batches(3, 2, Device(0, ERRORS[0]).run))
    assert "--pictures 0" in caught.value.fix


def test_any_other_error_is_none_of_memory() -> None:
    device = Device(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(4, 4, device.run))
    assert device.tried == [4]
    assert [is_out_of_memory(error) for error in (ValueError("out of memory"), RuntimeError("alloc"))] == [False, False]


def test_an_allocation_that_torch_refuses_on_a_cpu_is_noticed() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
