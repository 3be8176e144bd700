"""One small training loop for learned passes: seeded by step, resumable, with budgets, stop rules and curves."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save, tensor_bytes
from erasec.errors import ErasecError
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

SAVE_EVERY_S = 60.0
DRIFT_EVERY = 10

Losses = dict[str, Tensor]
Curves = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Turn:
    """What one part of a step updates: AdamW on ``trained`` (by name) with the sum of what ``loss`` returns.

    ``loss`` gets a generator of its own for every call, a function of seed, step, turn and process alone. It is called
    ``times`` times a step, each with an update; where ``accumulate``, gradients are never set to zero. Where
    ``numbered``, it also gets the number of the step. It may call backward on a part of it itself, and return that part
    detached.
    """

    trained: Mapping[str, Tensor]
    lr: float
    loss: Callable[..., Losses]
    times: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    clip: float = 0.0
    accumulate: bool = False
    numbered: bool = False


@dataclass
class Run:
    """How a training went: steps done, why it ended before its budget ("" where it did not), measurements by step."""

    steps: int = 0
    stopped: str = ""
    rolled_back: bool = False
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=dict)

    def stats(self) -> dict[str, float]:
        """The numbers for a report: each loss as the mean of its first and of its last tenth."""
        found = {"steps": float(self.steps), "stopped": (2.0 if self.rolled_back else 1.0) if self.stopped else 0.0}
        for name, values in self.curves.items():
            part = max(1, len(values) // 10)
            if name.startswith("loss"):
                found[f"{name}_first"] = sum(values[:part]) / part
                found[f"{name}_last"] = sum(values[-part:]) / part
            elif values:
                found[name] = values[-1]
        return found


def fingerprint(step: Any, model: Model, concept: Concept, context: Context) -> str:
    """What a training depends on, as sha256: pass, options and the files they name, concept, model, its edits to the
    byte, device, seed and number of processes."""
    options = asdict(step)
    content = [step.name, step.version, options, concept.model_dump(mode="json"), model.digest, context.device,
               context.seed, processes()]  # fmt: skip
    found = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for value in options.values():
        named = Path(value).expanduser() if isinstance(value, str) and value else None
        for file in _files(named) if named is not None and named.exists() else ():
            found.update(f"{file.relative_to(named) if named else ''} {file_digest(file)}".encode())
    for edit in model.edits:
        shared: dict[int, Any] = {}  # all sites of a closed-form edit share one change
        for site, delta in sorted(edit.deltas.items()):
            found.update(f"{site} {list(shared).index(id(delta)) if id(delta) in shared else len(shared)}".encode())
            shared.setdefault(id(delta), delta)
        for held in (*shared.values(), *edit.memories):
            for part in fields(held):
                value = getattr(held, part.name)
                found.update(tensor_bytes(value) if isinstance(value, torch.Tensor) else str(value).encode())
        for name in sorted(edit.tokens):
            found.update(name.encode() + tensor_bytes(edit.tokens[name]))
    return found.hexdigest()


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def processes() -> int:
    """How many processes train together: those that ``accelerate launch`` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def generator(seed: int, step: int, turn: int = 0, time_: int = 0) -> Generator:
    """The generator of one call of a loss: the same whatever was drawn before, another in every process."""
    rank = int(os.environ.get("RANK", "0"))
    text = f"{seed} {step} {turn} {time_} {rank}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))


def fit(
    name: str, turns: Sequence[Turn], *, steps: int, seed: int, minutes: float = 0.0, ema: float = 0.0,
    work: Path | None = None, drift: Callable[[], float] | None = None,
    look: Callable[[], Mapping[str, float]] | None = None, enough: Callable[[Curves], str] | None = None,
    guard: Callable[[Curves], str] | None = None,
) -> Run:  # fmt: skip
    """Train for at most ``steps`` steps and, above 0, about ``minutes`` minutes.

    ``work`` is a file that holds the state of a run that was interrupted; it is read, kept up to date, and left behind
    whole. After every step ``look`` measures more curves; then, given all curves, ``guard`` says why the step went too
    far, and it is taken back, or ``enough`` why it is time to stop. Both return "" to go on. ``drift`` is measured now
    and then, and of what is left in the end. ``ema`` above 0 leaves the moving average of that decay in place of the
    last values (Polyak averaging, warmed up). Raises ErasecError where a loss or a gradient is not finite.
    """
    loop = _Loop(turns, ema)
    run = loop.restore(work) if work is not None and work.exists() else Run()
    began = time.monotonic() - run.seconds
    saved = time.monotonic()
    good = loop.kept() if guard else ({}, {})
    with bar(name, steps) as advance:
        advance(run.steps)
        while run.steps < steps and not run.stopped:
            run.seconds = _agreed(time.monotonic() - began)
            if minutes and run.seconds > 60 * minutes:
                run.stopped = f"the {minutes:g} minutes are over"
                break
            losses = loop.step(name, run, seed, work)
            for key, value in losses.items():
                run.curves.setdefault(key, []).append(value)
            run.steps += 1
            if drift is not None and (run.steps % DRIFT_EVERY == 0 or run.steps == 1):
                run.curves.setdefault("drift", []).append(drift())
            for key, value in (look() if look else {}).items():
                run.curves.setdefault(key, []).append(value)
            if guard and (reason := guard(run.curves)):
                loop.back(*good)
                run.stopped, run.rolled_back = reason, True
            elif enough and (reason := enough(run.curves)):
                run.stopped = reason
            elif guard:
                good = loop.kept()
            advance(note=f"loss {sum(losses.values()):.4g}")
            if work is not None and time.monotonic() - saved > SAVE_EVERY_S:
                loop.save(work, run)
                saved = time.monotonic()
    if work is not None:
        loop.save(work, run)
    loop.finish()
    if drift is not None:
        run.curves.setdefault("drift", []).append(drift())
    return run


class _Loop:
    """Turns with their optimizers, and everything of them that a resumed run needs."""

    def __init__(self, turns: Sequence[Turn], ema: float) -> None:
        self.turns, self.ema = turns, ema
        self.optimizers = [
            torch.optim.AdamW(list(turn.trained.values()), turn.lr, turn.betas, turn.eps, turn.decay) for turn in turns
        ]
        self.named = {f"{at}/{name}": value for at, turn in enumerate(turns) for name, value in turn.trained.items()}
        self.average = self.values() if ema else {}
        for value in self.named.values():
            value.requires_grad_(False)

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named.items()}

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the values and of their averages, for ``back``."""
        return self.values(), {name: value.clone() for name, value in self.average.items()}

    def back(self, values: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.put(values)
        self.average = dict(average)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.named.items():
            value.copy_(values[name])

    def step(self, name: str, run: Run, seed: int, work: Path | None) -> dict[str, float]:
        told: dict[str, float] = {}
        for number, (turn, optimizer) in enumerate(zip(self.turns, self.optimizers, strict=True)):
            for value in turn.trained.values():
                value.requires_grad_(True)
            for repeat in range(turn.times):
                given = (run.steps,) if turn.numbered else ()
                if not turn.accumulate:
                    optimizer.zero_grad(set_to_none=True)
                losses = turn.loss(generator(seed, run.steps, number, repeat), *given)
                total = torch.stack(list(losses.values())).sum()
                if total.requires_grad:
                    total.backward()
                told |= {key: float(value.detach()) for key, value in losses.items()}
                grads = [value.grad for value in turn.trained.values() if value.grad is not None]
                _average(grads)
                norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
                if not (bool(torch.isfinite(total)) and bool(torch.isfinite(norm))):
                    self._failed(name, run, told, work, not (number or repeat or turn.accumulate))
                if turn.clip and grads:
                    torch.nn.utils.clip_grads_with_norm_(list(turn.trained.values()), turn.clip, norm)
                optimizer.step()
            for value in turn.trained.values():
                value.requires_grad_(False)
                if not turn.accumulate:
                    value.grad = None
        if self.ema:
            decay = min(self.ema, (1 + run.steps) / (10 + run.steps))
            for key, value in self.named.items():
                self.average[key].lerp_(value.detach(), 1 - decay)
        return told

    def _failed(self, name: str, run: Run, told: Mapping[str, float], work: Path | None, whole: bool) -> None:
        """No update is made from a bad gradient: before a step's first, the values are those of the last good step."""
        if work is not None and whole:
            self.save(work, run)
        said = ", ".join(f"{key} {value:.4g}" for key, value in told.items())
        kept = work is not None and work.exists()
        raise ErasecError(
            f"{name}: the loss or its gradient is not finite at step {run.steps + 1}", why=said,
            fix="lower lr or guidance, which trains from the start"
            + (f"; the last good state is kept in {work.name}" if work is not None and kept else ""),
            where=str(work.parent) if work is not None and kept else "",
        )  # fmt: skip

    def save(self, path: Path, run: Run) -> None:
        if int(os.environ.get("RANK", "0")):
            return
        tensors = {f"value/{name}": value.detach() for name, value in self.named.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        tensors |= {f"grad/{name}": value.grad for name, value in self.named.items() if value.grad is not None}
        for number, optimizer in enumerate(self.optimizers):
            names = list(self.turns[number].trained)
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"adam/{number}/{names[index]}/{part}": torch.as_tensor(state[part]) for part in state}
        path.parent.mkdir(parents=True, exist_ok=True)
        save(
            path, {key: tensor.cpu() for key, tensor in tensors.items()}, {"erasec.run": json.dumps(asdict(run))}, 0o600
        )

    def restore(self, path: Path) -> Run:
        entries, metadata = read_header(path)
        tensors = {key: read_tensor(entry) for key, entry in entries.items()}
        self.put({name: tensors[f"value/{name}"] for name in self.named})
        for name in self.average:
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, value in self.named.items():
            if f"grad/{name}" in tensors:
                value.grad = tensors[f"grad/{name}"].to(value.device)
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for index, name in enumerate(self.turns[number].trained):
                start = f"adam/{number}/{name}/"
                parts = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
                if parts:
                    state[index] = parts
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return Run(**json.loads(metadata["erasec.run"]))

    def finish(self) -> None:
        if self.ema:
            self.put(self.average)
        for value in self.named.values():
            value.grad = None


def _average(grads: Sequence[Tensor]) -> None:
    """The mean over all processes, in place."""
    if processes() > 1:
        import torch.distributed as dist

        _joined()
        for grad in grads:
            dist.all_reduce(grad)
            grad /= processes()


def _agreed(seconds: float) -> float:
    """The main process's clock, so that all stop at the same step."""
    if processes() == 1:
        return seconds
    import torch.distributed as dist

    device = _joined()
    told = torch.tensor([seconds], device=device)
    dist.broadcast(told, 0)
    return float(told)


def _joined() -> torch.device:
    """Join the other processes, once; this one's device."""
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device
