"""Inversion: new tokens, or free text states, are trained until the audited model predicts the noise of pictures of the
concept.

Gal et al., "An Image is Worth One Word", 2022, arXiv:2208.01618; on erased models Pham et al., "Circumventing Concept
Erasure Methods", ICLR 2024, arXiv:2308.01508. An optimiser may also teach a model what it never saw: the twin says how
far that goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from erasec.base import Attempt, Probe, Role, Threat
from erasec.errors import ErasecError
from erasec.options import options
from erasec.progress import bar
from erasec.training.loop import step_rng
from erasec.training.vocabulary import Vocabulary

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject

TOKEN = "<concept-{}>"
SPREAD = 3.0  # standard deviation of the first rows, relative to that of the token table


def noise_loss(subject: Subject, targets: Tensor, batch: int, states: Tensor, rng: Generator) -> Tensor:
    """The mean squared error of the predicted noise for ``batch`` noised ``targets`` (n, c, h, w), drawn by ``rng``.

    The text ``states`` are (1, t, d) or (batch, t, d).
    """
    chosen = torch.randint(len(targets), (batch,), generator=rng)
    # One timestep in each of ``batch`` equal parts of the schedule: the loss differs more between them than by states.
    parts = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
    timesteps = (parts * subject.denoiser.steps).long().to(subject.device)
    clean = targets[chosen].to(subject.device)
    noise = torch.randn(clean.shape, generator=rng).to(subject.device)
    noisy = subject.denoiser.add_noise(clean, noise, timesteps)
    prediction = subject.predict(noisy, timesteps, states.expand(batch, -1, -1))
    return (prediction - noise).pow(2).mean()


def optimise(
    parameters: Sequence[Tensor],
    loss: Callable[[Generator], Tensor],
    steps: int,
    lr: float,
    seed: int,
    title: str,
) -> tuple[float, float]:
    """Minimise ``loss`` by AdamW, with a cosine decay of ``lr``: the last steps average the noise of the loss.

    Returns the means of the first and of the last tenth of its values. Every call of ``loss`` gets a generator of its
    own. Raises ErasecError where the loss is not finite.
    """
    for value in parameters:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    values: list[float] = []
    with bar(title, steps) as advance:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            value = loss(step_rng(seed, step))
            if not torch.isfinite(value):
                raise ErasecError(f"{title}: the loss is not finite at step {step + 1}", fix="lower the option lr")
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
            advance(note=f"loss {values[-1]:.3g}")
    for value in parameters:
        value.requires_grad_(False)
        value.grad = None
    part = max(1, steps // 10)
    return sum(values[:part]) / part, sum(values[-part:]) / part


@options
class Inversion(Probe):
    """Textual inversion: ``tokens`` new words are trained, and are the whole prompt. The attack learns from pictures by
    the base, and is scored with other seeds. In the control the words are random rows of the token table.

    The words start at random: on glyphs, words that start at a name of something else stay near it.
    """

    tokens: Annotated[int, Field(ge=1, le=8)] = 1
    steps: Annotated[int, Field(ge=1)] = 200
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-3

    name: ClassVar[str] = "inversion"
    summary: ClassVar[str] = "new words, trained on pictures of the concept"
    threat: ClassVar[Threat] = "weights"
    paper: ClassVar[str] = "arXiv:2308.01508"
    needs_base: ClassVar[bool] = True
    references: ClassVar[tuple[Role, ...]] = ("base", "twin")

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        targets, vocabulary = bench.targets(), self._vocabulary(bench, subject)

        def loss(rng: Generator) -> Tensor:
            return noise_loss(subject, targets, self.batch, vocabulary.states([self._words]), rng)

        title = f"inversion, {self.tokens} tokens, {subject.role}"
        first, last = optimise([vocabulary.table.change], loss, self.steps, self.lr, bench.settings.seed, title)
        yield self._scored(bench, subject, vocabulary, {"loss_first": first, "loss_last": last})

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        vocabulary = self._vocabulary(bench, subject)
        rng = Generator().manual_seed(bench.settings.seed)
        rows = torch.randint(len(vocabulary.table.frozen), (self.tokens,), generator=rng)
        vocabulary.table.start = vocabulary.table.frozen[rows]
        yield self._scored(bench, subject, vocabulary, {})

    @property
    def _words(self) -> str:
        return " ".join(TOKEN.format(number) for number in range(self.tokens))

    def _vocabulary(self, bench: Bench, subject: Subject) -> Vocabulary:
        names = [TOKEN.format(number) for number in range(self.tokens)]
        vocabulary = Vocabulary(subject.model, "a", names, bench.settings.seed, subject.device)
        table, rng = vocabulary.table.frozen, Generator().manual_seed(bench.settings.seed)
        drawn = torch.randn(vocabulary.table.start.shape, generator=rng).to(table)
        vocabulary.table.start = SPREAD * table.std() * drawn
        return vocabulary

    @torch.no_grad()
    def _scored(self, bench: Bench, subject: Subject, vocabulary: Vocabulary, measured: dict[str, float]) -> Attempt:
        count = bench.settings.images
        states = vocabulary.states([self._words]).cpu().expand(count, -1, -1)
        painted = bench.paint(subject, states, subject.noise(bench.seeds("inversion", count)), "inversion")
        variant = f"{self.tokens} token{'s' if self.tokens > 1 else ''}, {self.steps} steps"
        return Attempt.single(variant, subject.decode(painted), measured=measured)


@options
class FreeStates(Probe):
    """Text states are trained without any words: ``rows="all"`` trains all of them, ``"one"`` a single one that is
    repeated. They start at those of the empty prompt. The control are random states of the same size.

    No text encoder can be asked for such states; the probe says what the denoiser can still draw at all.
    """

    rows: Literal["all", "one"] = "all"
    steps: Annotated[int, Field(ge=1)] = 450
    batch: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 0.02

    name: ClassVar[str] = "free_states"
    summary: ClassVar[str] = "text states without words, trained on pictures of the concept"
    threat: ClassVar[Threat] = "weights"
    needs_base: ClassVar[bool] = True
    references: ClassVar[tuple[Role, ...]] = ("base", "twin")

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        targets, empty = bench.targets(), subject.states([""]).to(subject.device)
        free = (empty[:, 1:].clone() if self.rows == "all" else empty[:, -1:].clone()).detach()

        def states() -> Tensor:
            body = free if self.rows == "all" else free.expand(-1, empty.shape[1] - 1, -1)
            return torch.cat([empty[:, :1], body], 1)  # the first row, that of the start token, stays

        def loss(rng: Generator) -> Tensor:
            return noise_loss(subject, targets, self.batch, states(), rng)

        title = f"free states, {self.rows}, {subject.role}"
        first, last = optimise([free], loss, self.steps, self.lr, bench.settings.seed, title)
        yield self._scored(bench, subject, states().detach(), {"loss_first": first, "loss_last": last})

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        empty = subject.states([""])
        rng = Generator().manual_seed(bench.settings.seed)
        shape = empty[:, 1:].shape if self.rows == "all" else (1, 1, empty.shape[2])
        drawn = torch.randn(shape, generator=rng)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True) * empty[:, 1:].norm(dim=-1).mean()
        states = torch.cat([empty[:, :1], drawn.expand(-1, empty.shape[1] - 1, -1)], 1)
        yield self._scored(bench, subject, states, {})

    def _scored(self, bench: Bench, subject: Subject, states: Tensor, measured: dict[str, float]) -> Attempt:
        count = bench.settings.images
        latents = subject.noise(bench.seeds("free states", count))
        painted = bench.paint(subject, states.cpu().expand(count, -1, -1), latents, "free states")
        rows = "every row" if self.rows == "all" else "one repeated row"
        return Attempt.single(f"{rows}, {self.steps} steps", subject.decode(painted), measured=measured)
