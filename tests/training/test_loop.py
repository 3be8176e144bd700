"""The training loop: repeatability, budgets and stop rules, and the state after a kill or a loss that is not finite."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from glyph_passes import tuned
from torch import Generator, Tensor

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint import sealed
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.edit import Dense, Edit, Remap
from erasec.model.memory import Memory
from erasec.model.view import Model
from erasec.passes.safegen import SafeGen
from erasec.recipe import concept as concepts
from erasec.training import loop
from erasec.training.loop import Objective


class Problem:
    """Two vectors, each pulled to noisy goals by an objective of its own."""

    def __init__(self, accumulate: bool = False, die_at: int = 0, break_at: int = 0, break_second_at: int = 0) -> None:
        self.one, self.two = torch.zeros(4), torch.ones(3)
        self.calls, self.die_at, self.break_at = 0, die_at, break_at
        self.second_calls, self.break_second_at = 0, break_second_at
        self.objectives = [
            Objective({"one": self.one}, 0.05, self.first, accumulate=accumulate),
            Objective({"two": self.two}, 0.02, self.second, repeats=2, clip=0.5),
        ]

    def first(self, rng: Generator) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        goal = 1 + 0.1 * torch.randn(4, generator=rng)
        scale = float("inf") if self.calls == self.break_at else 1.0
        return {"loss one": scale * (self.one - goal).square().sum()}

    def second(self, rng: Generator) -> dict[str, Tensor]:
        self.second_calls += 1
        scale = float("inf") if self.second_calls == self.break_second_at else 1.0
        return {"loss two": scale * (self.two + torch.rand(3, generator=rng)).square().sum()}

    def values(self) -> tuple[list[float], list[float]]:
        return self.one.tolist(), self.two.tolist()


def test_it_learns_and_records_its_measurements() -> None:
    problem = Problem()
    run = loop.fit("toy", problem.objectives, steps=40, seed=0, drift=lambda: 0.25)
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
        loop.fit("toy", problem.objectives, steps=8, seed=seed)
    assert problems[0].values() == problems[1].values()
    assert problems[0].values() != problems[2].values()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: bool, ema: float
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    whole = Problem(accumulate)
    straight = loop.fit("toy", whole.objectives, steps=12, seed=1, ema=ema)
    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        loop.fit("toy", Problem(accumulate, die_at=8).objectives, steps=12, seed=1, ema=ema, resume_file=state)
    again = Problem(accumulate)
    resumed = loop.fit("toy", again.objectives, steps=12, seed=1, ema=ema, resume_file=state)
    assert again.calls == 5  # steps 8 to 12: the first seven were not done again
    assert again.values() == whole.values()
    assert replace(resumed, seconds=straight.seconds) == straight


def test_a_finished_state_gives_the_result_without_another_step(tmp_path: Path) -> None:
    first, second = Problem(), Problem()
    loop.fit("toy", first.objectives, steps=5, seed=1, ema=0.9, resume_file=tmp_path / "state.safetensors")
    loop.fit("toy", second.objectives, steps=5, seed=1, ema=0.9, resume_file=tmp_path / "state.safetensors")
    assert second.calls == 0
    assert second.values() == first.values()


def test_accumulated_gradients_are_another_training() -> None:
    fresh, running = Problem(False), Problem(True)
    for problem in (fresh, running):
        loop.fit("toy", problem.objectives, steps=6, seed=1)
    assert fresh.one.tolist() != running.one.tolist()
    assert fresh.two.tolist() == running.two.tolist()


def test_the_average_lags_behind_the_last_values() -> None:
    last, mean = Problem(), Problem()
    loop.fit("toy", last.objectives, steps=20, seed=1)
    loop.fit("toy", mean.objectives, steps=20, seed=1, ema=0.99)
    assert bool((mean.one.abs() < last.one.abs()).all())


def test_minutes_end_a_run_before_its_steps() -> None:
    problem = Problem()
    run = loop.fit("toy", problem.objectives, steps=10**6, seed=0, minutes=0.05 / 60)
    assert 0 < run.steps < 10**6
    assert problem.calls == run.steps


def test_the_stop_rule_keeps_the_last_step_and_the_guard_undoes_it() -> None:
    problem = Problem()
    run = loop.fit(
        "toy", problem.objectives, steps=50, seed=0, stop_rule=lambda _: "there" if problem.calls == 7 else ""
    )
    assert (run.steps, run.stopped, run.rolled_back) == (7, "there", False)
    reference = Problem()
    loop.fit("toy", reference.objectives, steps=6, seed=0)
    back = Problem()
    run = loop.fit("toy", back.objectives, steps=50, seed=0, guard=lambda _: "too far" if back.calls == 7 else "")
    assert (run.steps, run.stopped, run.rolled_back) == (7, "too far", True)
    assert back.values() == reference.values()
    assert run.stats()["stopped"] == 2
    assert problem.values() != back.values()


def test_every_step_is_measured_and_guard_and_stop_rule_read_all_curves() -> None:
    problem, read = Problem(), {"guard": 0, "stop_rule": 0}

    def measure() -> Mapping[str, float]:
        return {"calls": float(problem.calls), "size": float(problem.one.norm())}

    def judge(name: str, curves: Mapping[str, Sequence[float]]) -> str:
        read[name] += 1
        assert curves.keys() == {"loss one", "loss two", "calls", "size"}
        assert {len(values) for values in curves.values()} == {problem.calls}
        return "so far" if name == "stop_rule" and curves["calls"][-1] == 5 else ""

    run = loop.fit(
        "toy",
        problem.objectives,
        steps=50,
        seed=0,
        measure=measure,
        guard=lambda curves: judge("guard", curves),
        stop_rule=lambda curves: judge("stop_rule", curves),
    )
    assert (run.steps, run.stopped, run.rolled_back) == (5, "so far", False)
    assert run.curves["calls"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert run.curves["size"][-1] == float(problem.one.norm()) != run.curves["size"][0]
    assert read == {"guard": 5, "stop_rule": 5}


class Clock:
    """A second for every step of a problem, and none between."""

    def __init__(self) -> None:
        self.before, self.problem = 0.0, Problem()

    def watch(self, problem: Problem) -> Problem:
        self.before, self.problem = self.monotonic(), problem
        return problem

    def monotonic(self) -> float:
        return self.before + self.problem.calls


def test_minutes_hold_over_a_resume_and_a_finished_run_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, state = Clock(), tmp_path / "state.safetensors"
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)

    def fit(problem: Problem, state: Path | None) -> loop.Run:
        return loop.fit("toy", clock.watch(problem).objectives, steps=100, seed=1, minutes=12 / 60, resume_file=state)

    straight = fit(Problem(), None)
    assert straight.steps == 13
    assert straight.stopped == "the 0.2 minutes are over"
    with pytest.raises(KeyboardInterrupt):
        fit(Problem(die_at=9), state)
    resumed = fit(Problem(), state)
    assert straight.steps <= resumed.steps <= straight.steps + 1  # not another 13 after the 8 that were done
    assert resumed.stopped == straight.stopped
    finished = Problem()
    again = fit(finished, state)
    assert finished.calls == 0
    assert again == resumed


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_drift_ends_with_that_of_what_is_left(tmp_path: Path, ema: float) -> None:
    problem, state = Problem(), tmp_path / "state.safetensors"

    def drift() -> float:
        return float(problem.one.norm())

    def guard(curves: Mapping[str, Sequence[float]]) -> str:
        return "too far" if problem.calls == 10 and not ema else ""

    run = loop.fit("toy", problem.objectives, steps=10, seed=0, ema=ema, drift=drift, guard=guard, resume_file=state)
    first, last, left = run.curves["drift"]
    assert run.rolled_back == (not ema)
    assert left == drift()
    assert first < left < last  # what was measured at step 10, before a part of it was taken back
    assert run.stats()["drift"] == left
    problem = Problem()
    again = loop.fit("toy", problem.objectives, steps=10, seed=0, ema=ema, drift=drift, guard=guard, resume_file=state)
    assert problem.calls == 0
    assert again == run


def test_an_undone_step_is_not_in_the_average_either() -> None:
    kept, back = Problem(), Problem()
    loop.fit("toy", kept.objectives, steps=6, seed=0, ema=0.9)
    loop.fit("toy", back.objectives, steps=50, seed=0, ema=0.9, guard=lambda _: "too far" if back.calls == 7 else "")
    assert back.values() == kept.values()


def test_only_its_owner_can_read_a_state(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    loop.fit("toy", Problem().objectives, steps=1, seed=0, resume_file=state)
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    assert stat.S_IMODE((tmp_path / "other.safetensors").stat().st_mode) == 0o644


def test_no_flipped_byte_of_a_state_is_resumed_from(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    loop.fit("toy", Problem().objectives, steps=3, seed=1, ema=0.9, resume_file=state)
    good = state.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    metadata = good.index(b"loss")  # a curve, in the header
    for place in (metadata, start, (start + len(good)) // 2, len(good) - 1):
        state.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        problem = Problem()
        with pytest.raises(ErasecError, match="the state of the training cannot be read") as caught:
            loop.fit("toy", problem.objectives, steps=5, seed=1, ema=0.9, resume_file=state)
        assert problem.calls == 0
        assert caught.value.where == str(state) and "delete this file" in caught.value.fix
        assert "content is not what was written" in caught.value.why
    state.write_bytes(good)
    loop.fit("toy", Problem().objectives, steps=5, seed=1, ema=0.9, resume_file=state)


def test_a_state_without_a_digest_is_resumed_from_and_stderr_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.safetensors"
    loop.fit("toy", Problem().objectives, steps=3, seed=1, resume_file=state)
    entries, metadata = checkpoint.read_header(state)
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in entries.items()}
    metadata = {key: value for key, value in metadata.items() if key != sealed.DIGEST}
    checkpoint.save_tensors(state, tensors, metadata)
    problem = Problem()
    loop.fit("toy", problem.objectives, steps=5, seed=1, resume_file=state)
    assert problem.calls == 2
    assert "state.safetensors is not verified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken", [{"break_second_at": 7}, {"break_second_at": 8}, {"break_at": 4, "accumulate": True}]
)
def test_a_loss_that_fails_within_a_step_saves_no_half_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, int]
) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(ErasecError, match="not finite at step 4") as caught:
        loop.fit("toy", Problem(**broken).objectives, steps=9, seed=2, resume_file=state)  # type: ignore[arg-type]
    assert not state.exists()
    assert "last finite state" not in caught.value.fix and caught.value.where == ""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)  # the state of the step before
    with pytest.raises(ErasecError, match="not finite at step 4") as caught:
        loop.fit("toy", Problem(**broken).objectives, steps=9, seed=2, resume_file=state)  # type: ignore[arg-type]
    assert f"the last finite state is in {state.name}" in caught.value.fix
    assert caught.value.where == str(tmp_path)
    good = Problem("accumulate" in broken)
    loop.fit("toy", good.objectives, steps=3, seed=2)
    entries, metadata = checkpoint.read_header(state)
    assert json.loads(metadata["erasec.run"])["steps"] == 3
    stored = [checkpoint.read_tensor(entries[f"value/{name}"]).tolist() for name in ("0/one", "1/two")]
    assert stored == list(good.values())


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(ErasecError, match="not finite at step 4") as caught:
        loop.fit("toy", Problem(break_at=4).objectives, steps=9, seed=2, resume_file=state)
    assert "lower lr" in caught.value.fix
    assert state.name in caught.value.fix
    good = Problem()
    loop.fit("toy", good.objectives, steps=3, seed=2)
    entries, metadata = checkpoint.read_header(state)
    assert json.loads(metadata["erasec.run"])["steps"] == 3
    assert checkpoint.read_tensor(entries["value/0/one"]).tolist() == good.one.tolist()


class TestFingerprint:
    """Which trainings share a saved state: equal ones resume from it, all others start anew."""

    @staticmethod
    def fingerprint(base: Model, step: SafeGen | None = None, name: str = "star", **context: object) -> str:
        where = Context(**context)  # type: ignore[arg-type]
        return loop.fingerprint(step or tuned(SafeGen), base, concepts.find(name, "glyphs"), where)

    @staticmethod
    def edit(base: Model, site: int = 0, scale: float = 1.0, weight: float = 1.0) -> Edit:
        """An edit whose description does not depend on its tensors."""
        changed = base.select("cross", "v")[site]
        memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 2, 192), weight=weight)
        value = scale * torch.ones(changed.shape)
        return Edit(
            {changed: Dense(value)}, "hand", ("heart",), "", memories=(memory,), tokens={"<a>": torch.ones(128)}
        )

    def test_of_the_same_it_is_the_same(self, base: Model, random_folder: Path) -> None:
        assert self.fingerprint(base) == self.fingerprint(loading.load(str(random_folder)))
        one, two = (base.with_edit(self.edit(base)) for _ in range(2))
        assert self.fingerprint(one) == self.fingerprint(two) != self.fingerprint(base)

    def test_of_another_pass_option_concept_seed_or_device_it_is_another(self, base: Model) -> None:
        fingerprints = {
            self.fingerprint(base),
            self.fingerprint(base, tuned(SafeGen, lr=1e-3)),
            self.fingerprint(base, name="heart"),
            self.fingerprint(base, seed=1),
            self.fingerprint(base, device="cuda"),
        }
        assert len(fingerprints) == 5

    def test_other_bytes_of_an_earlier_edit_are_another_model(self, base: Model) -> None:
        edit = self.edit(base)
        others = [
            edit,
            self.edit(base, scale=1.001),
            self.edit(base, weight=2.0),
            replace(edit, memories=()),
            replace(edit, tokens={"<b>": torch.ones(128)}),
            replace(edit, tokens={"<a>": torch.zeros(128)}),
        ]
        assert len({self.fingerprint(base.with_edit(other)) for other in others}) == len(others)

    def test_the_same_change_elsewhere_is_another_model(self, base: Model) -> None:
        shapes = [site.shape for site in base.select("cross", "v")]
        twin = next(number for number in range(1, len(shapes)) if shapes[number] == shapes[0])
        one, two = (base.with_edit(self.edit(base, site)) for site in (0, twin))
        assert self.fingerprint(one) != self.fingerprint(two)

    def test_merging_an_edit_does_not_make_it_another(self, base: Model) -> None:
        left, right = torch.ones(128, 2, dtype=torch.float64), torch.ones(2, 128, dtype=torch.float64)
        site = base.select("cross", "v")[0]
        edited = base.with_edit(Edit({site: Remap(left, right)}, "hand", ("heart",), ""))
        before = self.fingerprint(edited)
        edited.merged_weight(site)
        assert self.fingerprint(edited) == before

    def test_files_that_an_option_names_count_by_their_content(self, base: Model, tmp_path: Path) -> None:
        folder = tmp_path / "triplets"
        for name in ("benign", "censored", "concept"):
            (folder / name).mkdir(parents=True)
            (folder / name / "a.png").write_bytes(name.encode())
        step = tuned(SafeGen, triplets=str(folder))
        before = self.fingerprint(base, step)
        assert self.fingerprint(base, step) == before
        (folder / "concept" / "a.png").write_bytes(b"CONCEPT")
        assert self.fingerprint(base, step) != before
        (folder / "concept" / "a.png").write_bytes(b"concept")
        assert self.fingerprint(base, step) == before
        (folder / "concept" / "b.png").write_bytes(b"one more")
        assert self.fingerprint(base, step) != before

    def test_a_file_under_another_name_counts_too(self, base: Model, tmp_path: Path) -> None:
        folder = tmp_path / "triplets"
        for name in ("censored", "concept"):
            (folder / name).mkdir(parents=True)
        (folder / "censored" / "z.png").write_bytes(b"a picture")
        step = tuned(SafeGen, triplets=str(folder))
        before = self.fingerprint(base, step)
        (folder / "censored" / "z.png").rename(folder / "concept" / "a.png")
        assert self.fingerprint(base, step) != before


SCRIPT = """
import sys, torch
from erasec.training.loop import Objective, fit
value = torch.zeros(4)
def loss(rng):
    return {"loss": (value - torch.randn(4, generator=rng)).square().sum()}
run = fit("toy", [Objective({"value": value}, 0.1, loss)], steps=6, seed=5, minutes=5.0)
import os
from pathlib import Path
Path(sys.argv[1], os.environ.get("RANK", "alone")).write_text(f"{run.steps} {value.tolist()}")
"""


@pytest.mark.slow
def test_processes_that_accelerate_starts_train_together(tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(SCRIPT)
    # On CPUs accelerate leaves starting to torchrun or mpirun; for GPUs its launcher sets the same variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29711"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    # Each process writes a file of its own, as lines that two of them print may run into each other.
    script = [str(tmp_path / "both.py"), str(tmp_path)]
    subprocess.run([*launch, *script], capture_output=True, env=environment, check=True, timeout=240)
    subprocess.run([sys.executable, *script], capture_output=True, check=True, timeout=120)
    first, second, alone = ((tmp_path / name).read_text() for name in ("0", "1", "alone"))
    assert first == second  # one model
    assert first != alone  # that saw twice as much
