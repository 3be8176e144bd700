"""Searching for text states that make a network draw a concept, as an attacker with the weights does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from erasec.training.base import MEASURE_EVERY

if TYPE_CHECKING:
    from erasec.training.banks import Bank
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses

HELD_OUT = 16  # rows on which searched states are measured; no search draws them
START_NOISE = 0.05  # of the first states, relative to the deviation of the prompts' states
REPEATED = 4  # in every so many states one row repeats


class StateSearch:
    """``count`` text states that are trained until a denoiser predicts what ``bank`` holds as its predictions.

    ``free`` (count, t - 1, d) are their rows without that of the start token, which stays. In every fourth of them the
    first row is repeated in the places of all tokens. A pooled text state is a row like the others. Even ones start at
    the states of ``prompts``, odd ones near the states of the empty prompt. In a step, ``batch`` random rows of the
    bank are each predicted with a random state. After every ``restart`` steps one of the states starts anew; with 0
    none does.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bank: Bank,
        prompts: Sequence[str],
        count: int,
        batch: int,
        seed: int,
        restart: int = 0,
    ) -> None:
        self.denoiser, self.bank, self.count, self.batch, self.seed = denoiser, bank, count, batch, seed
        self.restart, self.step = restart, 0
        order = torch.randperm(len(bank.latents), generator=Generator().manual_seed(seed))
        # Of a tiny bank at least half is left for the search.
        held_out = min(HELD_OUT, len(order) // 2)
        self.held_out, self.rows = order[:held_out], order[held_out:]
        self._prompts = tuple(prompts)
        # Where the states of the empty prompt are zeros, the start token and the size of the noise are a prompt's.
        empty = denoiser.states([""])
        self._written = empty if bool(empty.any()) else denoiser.states(self._prompts[:1])
        self._first = self._written[:, :1]
        self.free = torch.stack([self._start(member, 0) for member in range(count)])

    def _start(self, member: int, step: int) -> Tensor:
        """The first rows (t - 1, d) of a state that starts at a step."""
        rng = Generator().manual_seed(self.seed * 1_000_003 + step * self.count + member)
        text = self._prompts[int(torch.randint(len(self._prompts), (1,), generator=rng))] if member % 2 == 0 else ""
        rows = self.denoiser.states([text])[0, 1:]
        noise = torch.randn(rows.shape, generator=rng).to(rows)
        return rows + START_NOISE * (rows if bool(rows.any()) else self._written[0, 1:]).std() * noise

    def draw(self, rng: Generator) -> Tensor:
        """Indices (batch,) of random rows of the bank that are not held out."""
        return self.rows[torch.randint(len(self.rows), (self.batch,), generator=rng)]

    def members(self, rng: Generator) -> Tensor:
        """The numbers (batch,) of random states."""
        return torch.randint(self.count, (self.batch,), generator=rng)

    def states(self, members: Tensor) -> Tensor:
        """The text states (n, t, d) of the ``members`` (n,)."""
        members = members.to(self.free.device)
        rows = self.free[members]
        repeated = (members % REPEATED == REPEATED - 1)[:, None, None]
        tokens = rows.shape[1] - bool(self.denoiser.model.family.pooled)
        same = torch.cat([rows[:, :1].expand(-1, tokens, -1), rows[:, tokens:]], 1)
        rows = torch.where(repeated, same, rows)
        return torch.cat([self._first.expand(len(rows), -1, -1), rows], 1)

    def loss(self, rng: Generator, step: int = 0) -> Losses:
        """The mean squared distance of the predictions for random rows and states from those of the bank, as noise."""
        self.step = step
        index = self.draw(rng)
        return {"loss search": self._distances(index, self.members(rng)).mean()}

    def after_step(self) -> dict[str, float]:
        """One state starts anew where it is time. Returns what the states recover, after every 25th step."""
        after = self.step + 1
        measured = {} if after % MEASURE_EVERY else {"recovered": self.recovered()}
        if self.restart and after % self.restart == 0:
            member = after // self.restart % self.count
            self.free.data[member] = self._start(member, after)
        return measured

    @torch.no_grad()
    def recovered(self) -> float:
        """The most that one of the states recovers of the bank's predictions on the held-out rows: 1 - |p - c|^2 /
        |u - c|^2 for its prediction p, the bank's prediction c and its unconditional one u; at least 0."""
        index = self.held_out
        apart = self.bank.unconditional[index] - self.bank.predictions[index]
        timesteps = self.bank.timesteps[index].to(self.denoiser.device)
        size = self.denoiser.as_noise(apart.to(self.denoiser.device), timesteps).square().mean()
        errors = [
            float(self._distances(index, torch.full((len(index),), member)).mean()) for member in range(self.count)
        ]
        return max(0.0, 1.0 - min(errors) / max(float(size), torch.finfo(torch.float32).tiny))

    def _distances(self, index: Tensor, members: Tensor) -> Tensor:
        """The mean squared distances (n,) of predictions for rows of the bank from those of the bank, as noise."""
        device = self.denoiser.device
        latents, timesteps, wanted = (
            values[index].to(device) for values in (self.bank.latents, self.bank.timesteps, self.bank.predictions)
        )
        error = self.denoiser.predict(latents, timesteps, self.states(members)) - wanted
        return self.denoiser.as_noise(error, timesteps).square().flatten(1).mean(1)
