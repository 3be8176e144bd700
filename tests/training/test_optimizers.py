"""The optimizer of a training: torch's, or one of bitsandbytes, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from erasec.errors import MissingTool
from erasec.training import loop
from erasec.training.loop import Objective
from erasec.training.optimizers import optimizer_class


class Counting(torch.optim.AdamW):
    """A stand-in for bitsandbytes' class: it takes the same arguments, and counts its steps in an int."""

    def step(self) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for value in group["params"]:
                count = self.state[value].get("count", 0)
                assert isinstance(count, int)  # also after the state was read from a file
                self.state[value]["count"] = count + 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bitsandbytes")
    module.optim = SimpleNamespace(AdamW8bit=Counting, PagedAdamW8bit=Counting)  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", module)


def train(optimizer: str, steps: int, state: Path | None = None) -> torch.Tensor:
    value = torch.zeros(8192)
    goal = torch.linspace(-1, 1, 8192)
    objective = Objective({"value": value}, 0.05, lambda rng: {"loss": (value - goal).square().sum()})
    loop.fit("toy", [objective], steps=steps, seed=0, optimizer=optimizer, resume_file=state)
    return value


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="bitsandbytes") as caught:
        optimizer_class("adamw-8bit")
    assert "erasec[memory]" in caught.value.fix
    assert optimizer_class("adamw") is torch.optim.AdamW


@pytest.mark.usefixtures("stand_in")
def test_a_state_with_whole_numbers_is_resumed(tmp_path: Path) -> None:
    straight = train("adamw-8bit", 6)
    train("adamw-8bit", 3, tmp_path / "state.safetensors")
    assert torch.equal(train("adamw-8bit", 6, tmp_path / "state.safetensors"), straight)
    assert not torch.equal(train("adamw-8bit", 5), straight)


def test_an_optimizer_of_8_bits_learns_and_resumes(tmp_path: Path) -> None:
    """The real library, where it is installed; it runs on a CPU as well."""
    pytest.importorskip("bitsandbytes")
    straight = train("adamw-8bit", 20)
    assert 0 < float((straight - train("adamw", 20)).abs().max()) < 0.2
    train("adamw-8bit", 10, tmp_path / "state.safetensors")
    assert torch.equal(train("adamw-8bit", 20, tmp_path / "state.safetensors"), straight)
