"""The loop: what is repeatable, what a budget and a stop rule do, and what is left after a kill or a bad loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from erasec import checkpoint, train
from erasec.errors import ErasecError
from erasec.train import Turn


class Problem:
    """Two vectors, each pulled to noisy goals in a turn of its own."""

    def __init__(self, accumulate: bool = False, die_at: int = 0, break_at: int = 0) -> None:
        self.one, self.two = torch.zeros(4), torch.ones(3)
        self.calls, self.die_at, self.break_at = 0, die_at, break_at
        self.turns = [
            Turn({"one": self.one}, 0.05, self.first, accumulate=accumulate),
            Turn({"two": self.two}, 0.02, self.second, times=2, clip=0.5),
        ]

    def first(self, chance: Generator) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        goal = 1 + 0.1 * torch.randn(4, generator=chance)
        scale = float("inf") if self.calls == self.break_at else 1.0
        return {"loss one": scale * (self.one - goal).square().sum()}

    def second(self, chance: Generator) -> dict[str, Tensor]:
        return {"loss two": (self.two + torch.rand(3, generator=chance)).square().sum()}

    def values(self) -> tuple[list[float], list[float]]:
        return self.one.tolist(), self.two.tolist()


def test_it_learns_and_tells_what_it_measured() -> None:
    problem = Problem()
    run = train.fit("toy", problem.turns, steps=40, seed=0, drift=lambda: 0.25)
    assert run.steps == 40
    assert run.stopped == ""
    assert len(run.curves["loss one"]) == len(run.curves["loss two"]) == 40
    stats = run.stats()
    assert stats["loss one_last"] < stats["loss one_first"] / 4
    assert stats["drift"] == 0.25
    assert float((problem.one - 1).abs().max()) < 0.5
    assert problem.calls == 40


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    problems = [Problem() for _ in range(3)]
    for problem, seed in zip(problems, (3, 3, 4), strict=True):
        train.fit("toy", problem.turns, steps=8, seed=seed)
    assert problems[0].values() == problems[1].values()
    assert problems[0].values() != problems[2].values()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: bool, ema: float
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY_S", -1.0)
    whole = Problem(accumulate)
    straight = train.fit("toy", whole.turns, steps=12, seed=1, ema=ema)
    work = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train.fit("toy", Problem(accumulate, die_at=8).turns, steps=12, seed=1, ema=ema, work=work)
    again = Problem(accumulate)
    resumed = train.fit("toy", again.turns, steps=12, seed=1, ema=ema, work=work)
    assert again.calls == 5  # steps 8 to 12: the first seven were not done again
    assert again.values() == whole.values()
    assert resumed == straight


def test_a_finished_state_gives_the_result_without_another_step(tmp_path: Path) -> None:
    first, second = Problem(), Problem()
    train.fit("toy", first.turns, steps=5, seed=1, ema=0.9, work=tmp_path / "s.safetensors")
    train.fit("toy", second.turns, steps=5, seed=1, ema=0.9, work=tmp_path / "s.safetensors")
    assert second.calls == 0
    assert second.values() == first.values()


def test_accumulated_gradients_are_another_training() -> None:
    fresh, running = Problem(False), Problem(True)
    for problem in (fresh, running):
        train.fit("toy", problem.turns, steps=6, seed=1)
    assert fresh.one.tolist() != running.one.tolist()
    assert fresh.two.tolist() == running.two.tolist()


def test_the_average_lags_behind_the_last_values() -> None:
    last, mean = Problem(), Problem()
    train.fit("toy", last.turns, steps=20, seed=1)
    train.fit("toy", mean.turns, steps=20, seed=1, ema=0.99)
    assert bool((mean.one.abs() < last.one.abs()).all())


def test_minutes_end_a_run_before_its_steps() -> None:
    problem = Problem()
    run = train.fit("toy", problem.turns, steps=10**6, seed=0, minutes=0.05 / 60)
    assert 0 < run.steps < 10**6
    assert problem.calls == run.steps


def test_enough_stops_and_keeps_and_a_guard_takes_back() -> None:
    problem = Problem()
    run = train.fit("toy", problem.turns, steps=50, seed=0, enough=lambda _: "there" if problem.calls == 7 else "")
    assert (run.steps, run.stopped, run.rolled_back) == (7, "there", False)
    reference = Problem()
    train.fit("toy", reference.turns, steps=6, seed=0)
    back = Problem()
    run = train.fit("toy", back.turns, steps=50, seed=0, guard=lambda _: "too far" if back.calls == 7 else "")
    assert (run.steps, run.stopped, run.rolled_back) == (7, "too far", True)
    assert back.values() == reference.values()
    assert run.stats()["stopped"] == 2
    assert problem.values() != back.values()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path: Path) -> None:
    work = tmp_path / "state.safetensors"
    with pytest.raises(ErasecError, match="not finite at step 4") as caught:
        train.fit("toy", Problem(break_at=4).turns, steps=9, seed=2, work=work)
    assert "lower lr" in caught.value.fix
    assert work.name in caught.value.fix
    good = Problem()
    train.fit("toy", good.turns, steps=3, seed=2)
    entries, metadata = checkpoint.read_header(work)
    assert json.loads(metadata["erasec.run"])["steps"] == 3
    assert checkpoint.read_tensor(entries["value/0/one"]).tolist() == good.one.tolist()


SCRIPT = """
import sys, torch
from erasec import train
from erasec.train import Turn
value = torch.zeros(4)
def loss(chance):
    return {"loss": (value - torch.randn(4, generator=chance)).square().sum()}
run = train.fit("toy", [Turn({"value": value}, 0.1, loss)], steps=6, seed=5, minutes=5.0)
import os
print("RESULT", os.environ.get("RANK", "0"), run.steps, value.tolist(), flush=True)
"""


@pytest.mark.slow
def test_processes_that_accelerate_starts_train_together(tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(SCRIPT)
    # On CPUs accelerate leaves starting to torchrun or mpirun; for GPUs its launcher sets the same variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29711"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    told = subprocess.run(
        [*launch, str(tmp_path / "both.py")], capture_output=True, text=True, env=environment, check=True, timeout=240
    ).stdout
    alone = subprocess.run(
        [sys.executable, str(tmp_path / "both.py")], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    lines = sorted(line for line in told.splitlines() if line.startswith("RESULT"))
    assert [line.split()[1] for line in lines] == ["0", "1"]
    assert lines[0].split(" ", 2)[2] == lines[1].split(" ", 2)[2]  # one model
    assert lines[0].split(" ", 2)[2] != alone.split(" ", 2)[2].strip()  # that saw twice as much
