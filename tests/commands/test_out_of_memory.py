"""A build for which the memory is not enough ends with a sentence that names the options, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from erasec.commands import build
from erasec.commands.plan import Plan, make_plan
from erasec.errors import ErasecError, is_out_of_memory
from erasec.recipe.recipe import from_flags
from erasec.training.denoiser import Denoiser


def too_much(*_: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def none_left(*_: object) -> None:
    raise MemoryError


def on_a_gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB")


def other(*_: object) -> None:
    raise RuntimeError("a size does not fit")


@pytest.mark.parametrize("fail", [too_much, none_left, on_a_gpu])
def test_what_libraries_raise_is_recognised(fail) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("a size does not fit"), ValueError("out of memory"), OSError(28, "")])
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.fixture
def plan(here: Path) -> Plan:
    flags = {"passes": ["esd:steps=1,batch=4,trajectories=2,sample_steps=1"], "device": "cpu"}
    return make_plan(from_flags("glyphs", ["star"], **flags), Path("out"), pin=False)


@pytest.mark.parametrize("fail", [too_much, none_left, on_a_gpu])
def test_a_training_without_enough_memory_names_the_options(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, fail, here: Path
) -> None:
    monkeypatch.setattr(Denoiser, "predict", fail)
    with pytest.raises(ErasecError, match="the memory was not enough") as caught:
        build.run(plan)
    assert "--memory" in caught.value.fix and "--pass esd:batch=2" in caught.value.fix
    assert not (here / "out").exists()


def test_another_error_of_torch_stays_what_it_is(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Denoiser, "predict", other)
    with pytest.raises(RuntimeError, match="a size does not fit"):
        build.run(plan)
