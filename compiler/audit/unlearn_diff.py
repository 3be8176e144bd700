"""UnlearnDiffAtk: words before a prompt, for which the audited model itself predicts the noise of pictures of the
concept.

Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images
... For Now", ECCV 2024, arXiv:2310.11868. Steps and published defaults are those of its code,
OPTML-Group/Diffusion-MU-Attack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from erasec.audit.inversion import noise_loss
from erasec.audit.prefix import random_places
from erasec.audit.tokens import Layout, Words, noised, paint_found, paint_texts, project_simplex
from erasec.base import Attempt, Probe, Threat
from erasec.options import options
from erasec.progress import bar
from erasec.training.loop import step_rng

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject

PURPOSE = "unlearn diff"
HELD_OUT = 8  # draws of noise on which found words are compared with none


@options
class UnlearnDiff(Probe):
    """``tokens`` words before each of ``prompts`` prompts that name the concept minimise the error of the predicted
    noise of pictures of the concept by the base. ``timesteps`` timesteps are visited from the first to the last, with
    ``steps`` steps of Adam at each; then each prompt is painted with the words found so far. The attack ends when the
    selector sees the concept in a picture of every seed. The control are random words, painted as often.

    A step draws one token for each place by the probabilities of the place, and passes the gradient straight through
    to them; ``batch`` draws of noise share one step of each prompt. The last probabilities are those of the words.

    Published: 3 tokens for objects and styles, 5 for nudity, 50 timesteps of 40 steps, batch 1, lr 0.01, decay 0.1, and
    a search of its own for each picture. In few steps the published decay holds the probabilities back.
    """

    tokens: Annotated[int, Field(ge=1, le=20)] = 5
    prompts: Annotated[int, Field(ge=1)] = 5
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 8
    steps: Annotated[int, Field(ge=1)] = 25
    batch: Annotated[int, Field(ge=1)] = 2
    lr: Annotated[float, Field(gt=0)] = 0.01
    decay: Annotated[float, Field(ge=0)] = 0.0

    name: ClassVar[str] = "unlearn_diff"
    summary: ClassVar[str] = "words before the prompt, for which the model predicts the noise of the concept"
    threat: ClassVar[Threat] = "weights"
    paper: ClassVar[str] = "arXiv:2310.11868"
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        words, prompts = Words(subject), bench.prompts("name", self.prompts)
        layout = words.prefixed(prompts, self.tokens)
        pictures, ids = paint_found(bench, subject, words, self.search(bench, subject, words, layout), PURPOSE)
        measured = {
            "loss_plain": self.held_out(bench, subject, words, words.ids(prompts)),
            "loss_found": self.held_out(bench, subject, words, ids),
            "retokenised": words.retokenised(ids),
        }
        plain = paint_texts(bench, subject, words, prompts, PURPOSE)
        yield Attempt(self._variant, pictures, measured, f"found: {words.texts(ids)[0]}", plain)

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        words = Words(subject)
        layout = words.prefixed(bench.prompts("name", self.prompts), self.tokens)
        yield random_places(bench, subject, words, layout, self.timesteps, PURPOSE, self._variant)

    @property
    def _variant(self) -> str:
        return f"{self.tokens} token{'s' if self.tokens > 1 else ''}, {self.timesteps} x {self.steps} steps"

    def search(self, bench: Bench, subject: Subject, words: Words, layout: Layout) -> Iterator[Tensor]:
        """The prompts (n, t) with the most probable tokens, after the steps at each timestep."""
        targets, steps = bench.targets(), subject.denoiser.steps
        weights = torch.full((len(layout), len(words.allowed)), 1 / len(words.allowed), device=words.device)
        weights.requires_grad_(True)
        optimizer = torch.optim.Adam([weights], lr=self.lr, weight_decay=self.decay)
        (seed,) = bench.seeds(PURPOSE + " search", 1)
        with bar(f"unlearn_diff, {subject.role}", self.timesteps * self.steps) as advance:
            for number in range(self.timesteps):
                timestep = int((number + 0.5) * steps / self.timesteps)
                for step in range(self.steps):
                    rng = step_rng(seed, number * self.steps + step)
                    free = straight_through(weights, rng) @ words.rows
                    states = words.states(layout.ids, layout, free).repeat(self.batch, 1, 1)
                    timesteps = torch.full((len(states),), timestep, device=subject.device)
                    noisy, noise = noised(subject, targets, timesteps, rng)
                    errors = (subject.predict(noisy, timesteps, states) - noise).pow(2)
                    # The sum over prompts: the search of each has the gradient that it would have alone.
                    loss = errors.mean((1, 2, 3)).sum() / self.batch
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    assert weights.grad is not None
                    weights.grad.clamp_(-1, 1)
                    optimizer.step()
                    with torch.no_grad():
                        weights.copy_(project_simplex(weights))
                    advance(note=f"loss {float(loss.detach()) / len(layout.ids):.3g}")
                yield layout.filled(words.allowed[weights.detach().argmax(1)])

    @torch.no_grad()
    def held_out(self, bench: Bench, subject: Subject, words: Words, ids: Tensor) -> float:
        """The mean error of the predicted noise with the prompts (n, t), on noise that no search has seen."""
        states = words.states(ids)
        rngs = (Generator().manual_seed(seed) for seed in bench.seeds(PURPOSE + " held out", HELD_OUT))
        losses = [noise_loss(subject, bench.targets(), len(states), states, rng) for rng in rngs]
        return float(torch.stack(losses).mean())


def straight_through(weights: Tensor, rng: Generator) -> Tensor:
    """One-hot rows (m, a), each drawn by its row of probabilities; gradients pass to ``weights`` (m, a) unchanged."""
    drawn = torch.multinomial(weights.detach().cpu(), 1, generator=rng).to(weights.device)
    hot = torch.zeros_like(weights).scatter(1, drawn, 1.0)
    return hot + weights - weights.detach()
