"""The training loop of a reference world's stages: seeded by step, resumable, with a log file and a progress bar."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from erasec.progress import bar

SAVE_EVERY_S = 60.0

Modules = dict[str, Any]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then cosine decay to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def fit(
    folder: Path,
    steps: int,
    peak: float,
    optimizer: torch.optim.Optimizer,
    parts: Modules,
    step_loss: Callable[[int, torch.Generator], Tensor],
    seed: int,
    after: Callable[[int], None] | None = None,
) -> None:
    """Run ``steps`` updates on ``step_loss``, which is called with the step and a generator seeded for that step.

    The state is saved in ``folder`` every minute and resumed from there. ``parts`` are the modules and averages to
    save, by name. ``after`` is called after each update. Exits if a loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved, first = folder / "resume.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state.pop("step")
        if "optimizer" in state:  # published weights have none
            optimizer.load_state_dict(state.pop("optimizer"))
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save(step: int) -> None:
        state = {"step": step, "optimizer": optimizer.state_dict(), **{n: p.state_dict() for n, p in parts.items()}}
        torch.save(state, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    last, losses = time.monotonic(), []
    with bar(folder.name, steps) as advance, (folder / "log.txt").open("a") as log:
        advance(first)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            loss = step_loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
            if not torch.isfinite(loss):
                raise SystemExit(f"{folder.name}: loss is {loss.item()} at step {step}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            if after:
                after(step)
            losses.append(loss.item())
            advance(note=f"loss {losses[-1]:.3f}")
            if (step + 1) % 50 == 0:
                log.write(f"{step + 1} {np.mean(losses[-50:]):.4f} {time.time():.0f}\n")
                log.flush()
            if time.monotonic() - last > SAVE_EVERY_S or step + 1 == steps:
                save(step + 1)
                last = time.monotonic()


@contextmanager
def half_precision(device: str, enabled: bool) -> Iterator[None]:
    """Compute convolutions and matrix products in bfloat16, and attention and group norm in float32.

    On CPUs with AMX this halves the time of a step. PyTorch's bfloat16 kernels for attention and group norm are several
    times slower than those for float32 there, so both are called with float32 inputs.
    """
    if not enabled:
        yield
        return
    attend, normalise = F.scaled_dot_product_attention, F.group_norm

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            with torch.autocast(device, enabled=False):
                return function(*(a.float() if isinstance(a, Tensor) else a for a in arguments), **options)

        return call

    F.scaled_dot_product_attention, F.group_norm = in_float32(attend), in_float32(normalise)
    try:
        with torch.autocast(device, torch.bfloat16):
            yield
    finally:
        F.scaled_dot_product_attention, F.group_norm = attend, normalise


class Average:
    """Exponential moving average of a module's state, with a warm-up so that early weights have no influence."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.module.state_dict().items():
            self.shadow[name].lerp_(value, 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.shadow = state
