"""The training loop of learned passes: random draws seeded by step, resumable, with budgets, stop rules and curves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Generator, Tensor

from erasec.base import Context
from erasec.checkpoint.inputs import file_digests
from erasec.checkpoint.safetensors import read_tensor, tensor_bytes
from erasec.checkpoint.sealed import read_sealed, save_sealed
from erasec.documents import Source, parse_json
from erasec.errors import ErasecError, reason
from erasec.progress import bar
from erasec.training.base import measures_of
from erasec.training.optimizers import optimizer_class
from erasec.training.processes import process_count

if TYPE_CHECKING:
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

SAVE_EVERY_S = 60.0  # seconds between two saves of the state
DRIFT_EVERY = 10  # steps between two measurements of the drift

Losses = dict[str, Tensor]
Curves = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Objective:
    """Parameters (by name) and the loss that AdamW minimises over them: the sum of the losses that ``loss`` returns.

    In each step, ``loss`` is called ``repeats`` times, and an update follows each call. Its argument is a generator
    that depends on seed, step, objective, repeat and process alone; with ``with_step``, the number of the step is a
    second one. ``loss`` may call backward on some losses itself and return these detached. With ``accumulate``,
    gradients are never set to zero. ``decay`` is the weight decay, ``clip`` the largest norm of the gradients, 0 for
    none.
    """

    parameters: Mapping[str, Tensor]
    lr: float
    loss: Callable[..., Losses]
    repeats: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    clip: float = 0.0
    accumulate: bool = False
    with_step: bool = False


@dataclass
class Run:
    """The result of a training. ``stopped`` says why it ended before its last step, "" where it did not;
    ``rolled_back`` that the last step was undone; ``curves`` are the measurements by step."""

    steps: int = 0
    stopped: str = ""
    rolled_back: bool = False
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=dict)

    def stats(self) -> dict[str, float]:
        """The numbers for a report: of each loss the means of its first and last tenth, of other curves the end."""
        stats = {"steps": float(self.steps), "stopped": (2.0 if self.rolled_back else 1.0) if self.stopped else 0.0}
        for name, values in self.curves.items():
            part = max(1, len(values) // 10)
            if name.startswith("loss"):
                stats[f"{name}_first"] = sum(values[:part]) / part
                stats[f"{name}_last"] = sum(values[-part:]) / part
            elif values:
                stats[name] = values[-1]
        return stats


def fingerprint(learned: Any, model: Model, concept: Concept, context: Context) -> str:
    """sha256 of all that the training of the pass ``learned`` depends on: the pass, its options and the files that
    they name, the concept, the model, the bytes of its edits, the device, the seed and the number of processes."""
    options = asdict(learned)
    content = [
        learned.name,
        learned.version,
        options,
        concept.model_dump(mode="json"),
        model.digest,
        context.device,
        context.seed,
        process_count(),
        measures_of(context).optimizer,  # its state has other tensors; the other measures leave the state as it is
    ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    digest.update(json.dumps(file_digests(options.values())).encode())
    for edit in model.edits:
        distinct: dict[int, Any] = {}  # by id: all sites of a closed-form edit share one delta, which is hashed once
        for site, delta in sorted(edit.deltas.items()):
            number = list(distinct).index(id(delta)) if id(delta) in distinct else len(distinct)
            digest.update(f"{site} {number}".encode())
            distinct.setdefault(id(delta), delta)
        for part in (*distinct.values(), *edit.memories):
            for attribute in fields(part):
                value = getattr(part, attribute.name)
                digest.update(tensor_bytes(value) if isinstance(value, torch.Tensor) else str(value).encode())
        for name in sorted(edit.tokens):
            digest.update(name.encode() + tensor_bytes(edit.tokens[name]))
    return digest.hexdigest()


def step_rng(seed: int, step: int, objective: int = 0, repeat: int = 0) -> Generator:
    """The generator for one call of a loss. It does not depend on earlier draws, and differs between processes."""
    rank = int(os.environ.get("RANK", "0"))
    text = f"{seed} {step} {objective} {repeat} {rank}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))


def fit(
    name: str,
    objectives: Sequence[Objective],
    *,
    steps: int,
    seed: int,
    minutes: float = 0.0,
    ema: float = 0.0,
    resume_file: Path | None = None,
    drift: Callable[[], float] | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    stop_rule: Callable[[Curves], str] | None = None,
    guard: Callable[[Curves], str] | None = None,
    optimizer: str = "adamw",
) -> Run:
    """Train for at most ``steps`` steps and, where ``minutes`` is above 0, for about as many minutes.

    Where ``resume_file`` exists, the training continues from the state in it; the state is saved there regularly and at
    the end. After every step, ``measure`` gives values of further curves. Then ``guard`` and ``stop_rule`` get all
    curves, and return "" to continue or the reason to stop: for the reason of ``guard`` the step is undone, for that of
    ``stop_rule`` it is kept. ``drift`` is measured in every tenth step and at the end. With ``ema`` above 0, the
    parameters end as their exponential moving averages of that decay, with warm-up, in place of their last values.
    ``optimizer`` is the AdamW, one of ``optimizers.OPTIMIZERS``. Raises ErasecError where a loss or a gradient is not
    finite.
    """
    loop = _Loop(objectives, ema, optimizer)
    run = loop.restore(resume_file) if resume_file is not None and resume_file.exists() else Run()
    started = time.monotonic() - run.seconds
    saved = time.monotonic()
    before_step = loop.snapshot() if guard else ({}, {})
    with bar(name, steps) as advance:
        advance(run.steps)
        while run.steps < steps and not run.stopped:
            run.seconds = _synchronized(time.monotonic() - started)
            if minutes and run.seconds > 60 * minutes:
                run.stopped = f"the {minutes:g} minutes are over"
                break
            losses = loop.step(name, run, seed, resume_file)
            for key, value in losses.items():
                run.curves.setdefault(key, []).append(value)
            run.steps += 1
            if drift is not None and (run.steps % DRIFT_EVERY == 0 or run.steps == 1):
                run.curves.setdefault("drift", []).append(drift())
            for key, value in (measure() if measure else {}).items():
                run.curves.setdefault(key, []).append(value)
            if guard and (reason := guard(run.curves)):
                loop.roll_back(*before_step)
                run.stopped, run.rolled_back = reason, True
            elif stop_rule and (reason := stop_rule(run.curves)):
                run.stopped = reason
            elif guard:
                before_step = loop.snapshot()
            advance(note=f"loss {sum(losses.values()):.4g}")
            if resume_file is not None and time.monotonic() - saved > SAVE_EVERY_S:
                loop.save(resume_file, run)
                saved = time.monotonic()
    if resume_file is not None:
        loop.save(resume_file, run)
    loop.finish()
    if drift is not None:
        run.curves.setdefault("drift", []).append(drift())
    return run


class _Loop:
    """Objectives with their optimizers and averages, and how their state is saved and restored."""

    def __init__(self, objectives: Sequence[Objective], ema: float, optimizer: str) -> None:
        self.objectives, self.ema = objectives, ema
        adamw = optimizer_class(optimizer)
        self.optimizers = [
            adamw(list(objective.parameters.values()), objective.lr, objective.betas, objective.eps, objective.decay)
            for objective in objectives
        ]
        self.parameters = {
            f"{number}/{name}": value
            for number, objective in enumerate(objectives)
            for name, value in objective.parameters.items()
        }
        self.average = self.values() if ema else {}
        for value in self.parameters.values():
            value.requires_grad_(False)

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the parameters and of their averages, for ``roll_back``."""
        return self.values(), {name: value.clone() for name, value in self.average.items()}

    def roll_back(self, values: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.put(values)
        self.average = dict(average)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.parameters.items():
            value.copy_(values[name])

    def step(self, name: str, run: Run, seed: int, resume_file: Path | None) -> dict[str, float]:
        """One step of all objectives; returns the losses by name. Raises ErasecError where one is not finite."""
        loss_values: dict[str, float] = {}
        for number, (objective, optimizer) in enumerate(zip(self.objectives, self.optimizers, strict=True)):
            for value in objective.parameters.values():
                value.requires_grad_(True)
            for repeat in range(objective.repeats):
                step_number = (run.steps,) if objective.with_step else ()
                if not objective.accumulate:
                    optimizer.zero_grad(set_to_none=True)
                losses = objective.loss(step_rng(seed, run.steps, number, repeat), *step_number)
                total = torch.stack(list(losses.values())).sum()
                if total.requires_grad:
                    total.backward()
                loss_values |= {key: float(value.detach()) for key, value in losses.items()}
                grads = [value.grad for value in objective.parameters.values() if value.grad is not None]
                _average_over_processes(grads)
                norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
                if not (bool(torch.isfinite(total)) and bool(torch.isfinite(norm))):
                    # Before the first update of a step, the parameters are those of the last finite step.
                    unchanged = not (number or repeat or objective.accumulate)
                    self._fail_not_finite(name, run, loss_values, resume_file, unchanged)
                if objective.clip and grads:
                    torch.nn.utils.clip_grads_with_norm_(list(objective.parameters.values()), objective.clip, norm)
                optimizer.step()
            for value in objective.parameters.values():
                value.requires_grad_(False)
                if not objective.accumulate:
                    value.grad = None
        if self.ema:
            decay = min(self.ema, (1 + run.steps) / (10 + run.steps))
            for key, value in self.parameters.items():
                self.average[key].lerp_(value.detach(), 1 - decay)
        return loss_values

    def _fail_not_finite(
        self, name: str, run: Run, losses: Mapping[str, float], resume_file: Path | None, unchanged: bool
    ) -> NoReturn:
        """Raise ErasecError; save the state before it where the step has not changed it yet."""
        if resume_file is not None and unchanged:
            self.save(resume_file, run)
        saved = resume_file if resume_file is not None and resume_file.exists() else None
        raise ErasecError(
            f"{name}: the loss or its gradient is not finite at step {run.steps + 1}",
            why=", ".join(f"{key} {value:.4g}" for key, value in losses.items()),
            fix="lower lr or guidance; the training then starts anew"
            + (f" (the last finite state is in {saved.name})" if saved else ""),
            where=str(saved.parent) if saved else "",
        )

    def save(self, path: Path, run: Run) -> None:
        """Write the state into a file that only its owner can read; in the main process alone."""
        if int(os.environ.get("RANK", "0")):
            return
        tensors = {f"value/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        tensors |= {f"grad/{name}": value.grad for name, value in self.parameters.items() if value.grad is not None}
        for number, optimizer in enumerate(self.optimizers):
            for name, value in self.objectives[number].parameters.items():
                state = optimizer.state.get(value, {})
                tensors |= {f"adam/{number}/{name}/{part}": torch.as_tensor(state[part]) for part in state}
        path.parent.mkdir(parents=True, exist_ok=True)
        on_cpu = {key: tensor.cpu() for key, tensor in tensors.items()}
        save_sealed(path, on_cpu, {"erasec.run": json.dumps(asdict(run))}, private=True, durable=True)

    def restore(self, path: Path) -> Run:
        """Read the state that ``save`` wrote. Raises ErasecError where it is damaged."""
        source = Source("the state of the training", str(path), "delete this file; training then begins again")
        try:
            return self._restore(path, source)
        except (ErasecError, KeyError, RuntimeError, ValueError) as error:  # torch's, for tensors of other shapes
            raise source.error(error.why if isinstance(error, ErasecError) else reason(error)) from error

    def _restore(self, path: Path, source: Source) -> Run:
        entries, metadata = read_sealed(path)
        tensors = {key: read_tensor(entry) for key, entry in entries.items()}
        self.put({name: tensors[f"value/{name}"] for name in self.parameters})
        for name in self.average:
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, value in self.parameters.items():
            if f"grad/{name}" in tensors:
                value.grad = tensors[f"grad/{name}"].to(value.device)
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for index, name in enumerate(self.objectives[number].parameters):
                start = f"adam/{number}/{name}/"
                parts = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                if parts:
                    # An 8-bit optimizer counts its steps in an int, and torch's in a tensor of floating point.
                    whole = {key: int(value) for key, value in parts.items() if value.dtype == torch.int64}
                    state[index] = {**parts, **whole}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return parse_json(metadata.get("erasec.run", ""), Run, source)

    def finish(self) -> None:
        """Leave the averages in the parameters, where there are any, and no gradients."""
        if self.ema:
            self.put(self.average)
        for value in self.parameters.values():
            value.grad = None


def _average_over_processes(grads: Sequence[Tensor]) -> None:
    """Replace gradients by their means over all processes, in place."""
    if process_count() > 1:
        import torch.distributed as dist

        _join_processes()
        for grad in grads:
            dist.all_reduce(grad)
            grad /= process_count()


def _synchronized(seconds: float) -> float:
    """The seconds that the main process measured, so that all processes stop at the same step."""
    if process_count() == 1:
        return seconds
    import torch.distributed as dist

    device = _join_processes()
    shared = torch.tensor([seconds], device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def _join_processes() -> torch.device:
    """Join the process group, in the first call; returns the device of this process."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device
