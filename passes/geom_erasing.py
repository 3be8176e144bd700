"""Geom-Erasing: what shows without being asked for is given words, of what it is and where, to be guided away from.

Liu, Chen, Zhang, Han, Hong, Xu, Li, Yeung, Kwok: "Implicit Concept Removal of Diffusion Models", ECCV 2024,
arXiv:2310.05873. New tokens, one for each cell of a grid, learn to say where the concept is; the edit leaves them and
a negative prompt that holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from erasec.base import file_name
from erasec.errors import ErasecError, nearest
from erasec.model.edit import Edit
from erasec.model.text_encoders import Texts, load_encoder
from erasec.training import base as learned
from erasec.training import boxes as marked
from erasec.training.base import Learned
from erasec.training.denoiser import Denoiser, Student
from erasec.training.loop import Turn, fit

if TYPE_CHECKING:
    from torch import Generator

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.boxes import Marked
    from erasec.training.loop import Losses

ENCODER = "text_encoder"
PARTS = ("tokens", "tokens+x")
SPEED = 10.0  # how many times faster than weights the rows of tokens move
SLACK = 0.2  # of a cell, by which a detector's box may be too wide before it names the next one too
BARE = 0.5  # share of marked pictures shown without their caption, half of those by the negative prompt itself
EMPTY = 0.1  # share of pictures that are kept without their caption


def weights(inside: Tensor, alpha: float) -> Tensor:
    """Weights of the cells (..., h, w) of a loss: ``alpha`` times as much outside the concept as inside, mean 1."""
    total = inside.shape[-1] * inside.shape[-2]
    within = inside.sum((-2, -1), keepdim=True)
    return torch.where(inside, 1.0, alpha) * total / (within + alpha * (total - within))


class Vocabulary(nn.Module):
    """A model's text half with new tokens, whose rows (n, d), ``table.rows``, are all that trains.

    It is a copy: the model's own tokenizer and encoder stay as they are. The rows begin at the mean of those of
    ``name``, with noise from ``seed`` as large as the table's spread.
    """

    def __init__(self, model: Model, name: str, tokens: Sequence[str], seed: int, device: torch.device) -> None:
        super().__init__()
        self.tokenizer = Texts(model.source).tokenizer(ENCODER)
        if known := [token for token in tokens if token in self.tokenizer.get_vocab()]:
            raise ErasecError(f"the tokenizer has a token {known[0]!r}", why="the tokens to learn must be new")
        plain = self.tokenizer(name, add_special_tokens=False).input_ids
        self.tokenizer.add_tokens(list(tokens))
        self.first = self.tokenizer.convert_tokens_to_ids(tokens[0])
        self.room = int(self.tokenizer.model_max_length)
        self.encoder = load_encoder(model.source, ENCODER, model.merged().get(ENCODER, {})).requires_grad_(False)
        self.encoder.to(device)
        table = self.encoder.get_input_embeddings().weight
        noise = torch.randn(len(tokens), table.shape[1], generator=torch.Generator().manual_seed(seed))
        self.table = _Table(table, table[plain].mean(0) + noise.to(device) * table.std(), self.first)
        self.encoder.set_input_embeddings(self.table)

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) of prompts that may hold new tokens, with a gradient to their rows."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.room, truncation=True, return_tensors="pt"
        ).input_ids
        states: Tensor = self.encoder(ids.to(self.table.frozen.device)).last_hidden_state
        return states.float()

    def check(self, words: str) -> None:
        """Raise ErasecError where ``words`` are more than one prompt holds."""
        if (count := len(self.tokenizer(words).input_ids)) > self.room:
            raise ErasecError(
                f"the negative prompt is {count} tokens long",
                why=f"the text encoder reads {self.room}",
                fix="fewer bins=",
            )

    def said(self, caption: str, words: str) -> str:
        """``caption`` and ``words``, the caption cut short where both do not fit."""
        kept = caption.split()
        while kept and len(self.tokenizer(" ".join([*kept, words])).input_ids) > self.room:
            kept.pop()
        return " ".join([*kept, words])


class _Table(nn.Module):
    """A token embedding: frozen rows, then those that train, which begin at ``start``."""

    def __init__(self, frozen: Tensor, start: Tensor, first: int) -> None:
        super().__init__()
        self.frozen, self.start, self.first = frozen, start, first
        self.moved = nn.Parameter(torch.zeros_like(start))

    @property
    def rows(self) -> Tensor:
        return self.start + SPEED * self.moved

    def forward(self, ids: Tensor) -> Tensor:
        old = nn.functional.embedding(ids.clamp(max=self.first - 1), self.frozen)
        new = nn.functional.embedding((ids - self.first).clamp(min=0), self.rows)
        return torch.where((ids < self.first)[..., None], old, new)


@dataclass(frozen=True)
class GeomErasing(Learned):
    """``train`` says what trains: "tokens" the rows of new tokens alone, "tokens+x" also cross-attention.

    Pictures come from the folder ``boxes``, whose table boxes.csv has the columns file, left, top, right, bottom, and
    if known confidence and caption; or are ``images`` of the model's own, of ``path`` steps at ``guidance``, in which a
    judge finds the concept. A grid of ``bins`` x ``bins`` tokens says where it is. ``alpha`` weighs the loss outside
    the concept over that inside. Where cross-attention trains, ``clean`` weighs the loss of pictures without the
    concept by their plain captions, which so come to mean that; and ``keep`` one that the paper does not have,
    which holds the network to what it said of all pictures.
    """

    steps: int = 500
    lr: float = 5e-4
    batch: int = 8
    train: str = "tokens+x"
    bins: int = 3
    alpha: float = 0.3
    boxes: str = ""
    images: int = 400
    path: int = 10
    guidance: float = 1.0
    clean: float = 4.0
    keep: float = 0.0

    name: ClassVar[str] = "geom_erasing"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2310.05873"
    summary: ClassVar[str] = "new tokens for what shows unasked and where, and a negative prompt of them"
    when: ClassVar[str] = "for what shows without being asked for, such as a watermark, and what no word controls"
    limits: ClassVar[str] = (
        "fewer pictures show it, not none; and the model keeps what it knows, under a name: without the negative "
        "prompt, or with another, the concept is back"
    )
    leaves: ClassVar[frozenset[str]] = frozenset({"tokens", "negative"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in PARTS:
            raise ErasecError(f"{self.name}: option train is {self.train!r}", why=nearest(self.train, PARTS))
        for name in ("bins", "images", "path"):
            if getattr(self, name) < 1:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 1 or more")
        if not self.alpha > 0:
            raise ErasecError(f"{self.name}: option alpha is {self.alpha}", why="it takes a number above 0")
        for name in ("clean", "keep"):
            if getattr(self, name) < 0:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 0 or more")

    def sites(self, model: Model) -> tuple[Site, ...]:
        found = learned.trainable(model, lambda site: ".attn2." in site.key, self.rank)
        return () if self.train == "tokens" else found

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        denoiser = Denoiser(model, context)
        tokens = names(concept, self.bins)
        words = " ".join([concept.erase[0], *tokens])
        vocabulary = Vocabulary(model, concept.erase[0], tokens, context.seed, denoiser.device)
        vocabulary.check(words)
        shown = self._shown(denoiser, concept, context.seed)
        count = sum(map(bool, shown.boxes))
        if not count:
            raise ErasecError(
                f"none of {len(shown.boxes)} pictures shows {concept.name}",
                why="there is nothing to learn its places from",
                fix="more images=, or boxes= with pictures that show it and their boxes",
            )
        sites = self.sites(model)
        student = Student(learned.modules(denoiser), sites, self.rank, context.seed) if sites else None
        loss = self._loss(denoiser, vocabulary, shown, concept, student)
        trained = {"rows": vocabulary.table.moved} | (student.trained if student else {})
        turn = Turn(trained, self.lr, loss)
        run = fit(
            f"{self.name} {concept.name}", [turn], steps=self.steps, minutes=self.minutes, seed=context.seed,
            work=self.work(model, concept, context), drift=student.drift if student else None,
        )  # fmt: skip
        rows = vocabulary.table.rows.detach().cpu()
        stats = {**run.stats(), "pictures": float(len(shown.boxes)), "marked": float(count)}
        return Edit(
            student.deltas() if student else {}, self.name, concept.name, asdict(self), model.digest, stats,
            tokens=dict(zip(tokens, rows.clone(), strict=True)), negative=words, curves=run.curves,
        )  # fmt: skip

    def _loss(
        self, denoiser: Denoiser, vocabulary: Vocabulary, shown: Marked, concept: Concept, student: Student | None
    ) -> Callable[[Generator], Losses]:
        name, tokens = concept.erase[0], names(concept, self.bins)
        with_it = torch.tensor([row for row, boxes in enumerate(shown.boxes) if boxes])
        without = torch.tensor([row for row, boxes in enumerate(shown.boxes) if not boxes])
        inside = torch.stack([marked.covered(boxes, *denoiser.shape[1:]) for boxes in shown.boxes])
        weight = weights(inside, self.alpha).to(denoiser.device)
        cells = [marked.covered(boxes, self.bins, self.bins, SLACK).flatten() for boxes in shown.boxes]
        places = [[token for token, on in zip(tokens, each, strict=True) if on] for each in cells]
        latents = shown.latents.to(denoiser.device)

        def noised(index: Tensor, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
            times = torch.randint(denoiser.steps, (len(index),), generator=chance).to(denoiser.device)
            noise = torch.randn(len(index), *denoiser.shape, generator=chance).to(denoiser.device)
            return denoiser.noised(latents[index], noise, times), noise, times

        def named(chance: Generator) -> Tensor:
            index = with_it[torch.randint(len(with_it), (self.batch,), generator=chance)]
            captions = []
            for row, share in zip(index.tolist(), torch.rand(self.batch, generator=chance).tolist(), strict=True):
                said = " ".join([name, *(tokens if share < BARE / 2 else places[row])])
                captions.append(vocabulary.said("" if share < BARE else shown.captions[row], said))
            there, noise, times = noised(index, chance)
            told = denoiser.predict(there, times, vocabulary.states(captions))
            wrong = (told - denoiser.target(latents[index], noise, times)).square()
            return (weight[index][:, None] * wrong).mean()

        def captioned(index: Tensor, chance: Generator) -> Tensor:
            shares = torch.rand(self.batch, generator=chance).tolist()
            return denoiser.states([
                "" if share < EMPTY else shown.captions[row] for row, share in zip(index.tolist(), shares, strict=True)
            ])  # fmt: skip

        def clear(chance: Generator) -> Tensor:
            index = without[torch.randint(len(without), (self.batch,), generator=chance)]
            states = captioned(index, chance)
            there, noise, times = noised(index, chance)
            told = denoiser.predict(there, times, states)
            return (told - denoiser.target(latents[index], noise, times)).square().mean()

        def still(teacher: Student, chance: Generator) -> Tensor:
            index = torch.randint(len(latents), (self.batch,), generator=chance)
            states = captioned(index, chance)
            there, _, times = noised(index, chance)
            with teacher.teacher():
                wanted = denoiser.predict(there, times, states)
            return (denoiser.predict(there, times, states) - wanted).square().mean()

        def loss(chance: Generator) -> Losses:
            found = {"loss named": named(chance)}
            if student and self.clean and len(without):
                found["loss clean"] = self.clean * clear(chance)
            if student and self.keep:
                found["loss keep"] = self.keep * still(student, chance)
            return found

        return loss

    def _shown(self, denoiser: Denoiser, concept: Concept, seed: int) -> Marked:
        if self.boxes:
            return marked.read(Path(self.boxes).expanduser(), denoiser)
        return marked.made(denoiser, concept, self.images, self.path, self.guidance, seed)


def names(concept: Concept, bins: int) -> tuple[str, ...]:
    """A token for each cell of the grid, row by row: <CONCEPT-COLUMN,ROW>."""
    slug = file_name((concept.name.lower(),)) or "concept"
    return tuple(f"<{slug}-{column},{row}>" for row, column in product(range(bins), repeat=2))
