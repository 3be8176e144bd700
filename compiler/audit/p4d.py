"""Prompting4Debugging: words for which the audited model predicts what the base predicts for a prompt of the concept.

Chin et al., "Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts", ICML
2024, arXiv:2309.06135, and its code, joycenerd/P4D. Words are searched as in Wen et al., "Hard Prompts Made Easy",
NeurIPS 2023, arXiv:2302.03668, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import normalize

from erasec.audit.prefix import random_places
from erasec.audit.tokens import Layout, Words, noised, paint_found, paint_texts
from erasec.base import Attempt, Probe, Threat
from erasec.options import options
from erasec.progress import bar
from erasec.training.loop import step_rng

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject

PURPOSE = "p4d"


@options
class P4D(Probe):
    """Words minimise the distance of the model's prediction from that of the base with a prompt that names the concept,
    on noised pictures of the concept, without guidance. With mode "n" the whole prompt is ``tokens`` words; with "k"
    the prompt stays, and a word is put behind every ``every`` tokens of it.

    Each free place has a row that is trained by AdamW; the text encoder gets the allowed token whose row is nearest by
    the cosine, and the gradient passes straight through. ``steps`` steps for each of ``prompts`` prompts, with
    ``batch`` draws of noise in a step; every ``every_step`` steps the prompts are painted. The attack ends when the
    selector sees the concept in a picture of every seed. The control are random words in the same places, painted as
    often.

    Published: 16 tokens, or one behind every 3; 3000 steps, painted every 50, batch 1, lr 0.1, decay 0.1, and a search
    of its own for each picture. Names of the concept are not barred.
    """

    mode: Literal["n", "k"] = "n"
    tokens: Annotated[int, Field(ge=1, le=75)] = 16
    every: Annotated[int, Field(ge=1)] = 3
    prompts: Annotated[int, Field(ge=1)] = 5
    steps: Annotated[int, Field(ge=1)] = 160
    every_step: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=1)] = 2
    lr: Annotated[float, Field(gt=0)] = 0.1
    decay: Annotated[float, Field(ge=0)] = 0.1

    name: ClassVar[str] = "p4d"
    summary: ClassVar[str] = "words for which the model predicts what the base does for the concept"
    threat: ClassVar[Threat] = "weights"
    paper: ClassVar[str] = "arXiv:2309.06135"
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        words, prompts = Words(subject), bench.prompts("name", self.prompts)
        layout = self._layout(words, prompts)
        losses: list[float] = []
        found = self.search(bench, subject, words, layout, prompts, losses)
        pictures, ids = paint_found(bench, subject, words, found, PURPOSE)
        part = min(self.every_step, len(losses))
        measured = {
            "loss_first": sum(losses[:part]) / part,
            "loss_last": sum(losses[-part:]) / part,
            "retokenised": words.retokenised(ids),
        }
        plain = paint_texts(bench, subject, words, prompts, PURPOSE)
        yield Attempt(self._variant, pictures, measured, f"found: {words.texts(ids)[0]}", plain)

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        words = Words(subject)
        layout = self._layout(words, bench.prompts("name", self.prompts))
        count = -(-self.steps // self.every_step)
        yield random_places(bench, subject, words, layout, count, PURPOSE, self._variant)

    @property
    def _variant(self) -> str:
        places = f"{self.tokens} tokens" if self.mode == "n" else f"a token behind every {self.every}"
        return f"{places}, {self.steps} steps"

    def _layout(self, words: Words, prompts: list[str]) -> Layout:
        if self.mode == "n":
            return words.layout([[None] * self.tokens for _ in prompts])
        return words.interleaved(prompts, self.every)

    def search(
        self,
        bench: Bench,
        subject: Subject,
        words: Words,
        layout: Layout,
        prompts: list[str],
        losses: list[float],
    ) -> Iterator[Tensor]:
        """The prompts (n, t) with the nearest tokens, after every ``every_step`` steps. The mean loss of each step is
        appended to ``losses``."""
        targets, steps = bench.targets(), subject.denoiser.steps
        wanted = bench.base.states(prompts).to(subject.device).repeat(self.batch, 1, 1)
        (seed,) = bench.seeds(PURPOSE + " search", 1)
        first = torch.randint(len(words.allowed), (len(layout),), generator=Generator().manual_seed(seed))
        soft = words.rows[first.to(words.device)].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([soft], lr=self.lr, weight_decay=self.decay)
        with bar(f"p4d, {subject.role}", self.steps) as advance:
            for step in range(self.steps):
                rng = step_rng(seed, step)
                free = words.rows[nearest(soft, words.rows)] + soft - soft.detach()
                states = words.states(layout.ids, layout, free).repeat(self.batch, 1, 1)
                timesteps = torch.randint(steps, (len(states),), generator=rng).to(subject.device)
                noisy, _ = noised(subject, targets, timesteps, rng)
                with torch.no_grad():
                    goal = bench.base.predict(noisy, timesteps, wanted)
                errors = (subject.predict(noisy, timesteps, states) - goal).pow(2).mean((1, 2, 3))
                # The sum over prompts: the search of each has the gradient that it would have alone.
                loss = errors.sum() / self.batch
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()) / len(layout.ids))
                advance(note=f"loss {losses[-1]:.3g}")
                if (step + 1) % self.every_step == 0 or step + 1 == self.steps:
                    yield layout.filled(words.allowed[nearest(soft, words.rows)])


@torch.no_grad()
def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """The index (m,) of the row of ``table`` (a, d) that has the largest cosine with each of ``rows`` (m, d)."""
    return (normalize(rows, dim=1) @ normalize(table, dim=1).T).argmax(1)
