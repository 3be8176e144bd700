"""One small training loop for the stages of glyphs: seeded by step, resumable, with a log and a bar."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasec.progress import bar

SAVE_EVERY_S = 60.0

Modules = dict[str, Any]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the run, then a cosine down to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def fit(
    folder: Path, steps: int, peak: float, optimizer: torch.optim.Optimizer, parts: Modules,
    step_loss: Callable[[int, torch.Generator], Tensor], seed: int, after: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Run ``steps`` updates, saving now and then; ``parts`` are what else to save and resume, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    saved, first = folder / "resume.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state.pop("step")
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


class Average:
    """Exponential moving average of a module's parameters, warmed up so that early weights are forgotten."""

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
