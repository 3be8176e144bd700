"""New tokens that train: a copy of a model's text half whose token embedding grows by rows with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from erasec.errors import ErasecError
from erasec.model.text_encoders import TextEncoders, load_encoder

if TYPE_CHECKING:
    from erasec.model.view import Model


ENCODER = "text_encoder"
ROW_RATE = 10.0  # learning rate of the tokens' rows relative to that of weights


class Vocabulary(nn.Module):
    """A copy of a model's tokenizer and text encoder with new tokens. Only their rows (n, d), ``table.rows``, train.

    The rows start at the mean of the rows of ``name``, with noise from ``seed`` of the standard deviation of the table.
    Raises ErasecError for a token that the tokenizer already has.
    """

    def __init__(self, model: Model, name: str, tokens: Sequence[str], seed: int, device: torch.device) -> None:
        super().__init__()
        self.tokenizer = TextEncoders(model.source).tokenizer(ENCODER)
        if known := [token for token in tokens if token in self.tokenizer.get_vocab()]:
            raise ErasecError(f"the tokenizer has a token {known[0]!r}", why="the tokens to learn must be new")
        name_ids = self.tokenizer(name, add_special_tokens=False).input_ids
        self.tokenizer.add_tokens(list(tokens))
        self.first = self.tokenizer.convert_tokens_to_ids(tokens[0])
        self.max_tokens = int(self.tokenizer.model_max_length)
        self.encoder = load_encoder(model.source, ENCODER, model.merged().get(ENCODER, {})).requires_grad_(False)
        self.encoder.to(device)
        table = self.encoder.get_input_embeddings().weight
        noise = torch.randn(len(tokens), table.shape[1], generator=torch.Generator().manual_seed(seed))
        self.table = _Table(table, table[name_ids].mean(0) + noise.to(device) * table.std(), self.first)
        self.encoder.set_input_embeddings(self.table)

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) of prompts that may hold new tokens, with gradients to their rows."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids
        states: Tensor = self.encoder(ids.to(self.table.frozen.device)).last_hidden_state
        return states.float()

    def check_length(self, negative: str) -> None:
        """Raise ErasecError where the negative prompt has more tokens than the text encoder reads."""
        if (count := len(self.tokenizer(negative).input_ids)) > self.max_tokens:
            raise ErasecError(
                f"the negative prompt is {count} tokens long",
                why=f"the text encoder reads {self.max_tokens}",
                fix="lower bins",
            )

    def append_words(self, caption: str, words: str) -> str:
        """``caption`` and ``words`` as one prompt; the caption is cut where both do not fit."""
        parts = caption.split()
        while parts and len(self.tokenizer(" ".join([*parts, words])).input_ids) > self.max_tokens:
            parts.pop()
        return " ".join([*parts, words])


class _Table(nn.Module):
    """A token embedding of ``frozen`` rows, followed by rows that train and start at ``start``. ``first`` is the id of
    the first of these."""

    def __init__(self, frozen: Tensor, start: Tensor, first: int) -> None:
        super().__init__()
        self.frozen, self.start, self.first = frozen, start, first
        self.change = nn.Parameter(torch.zeros_like(start))

    @property
    def rows(self) -> Tensor:
        return self.start + ROW_RATE * self.change

    def forward(self, ids: Tensor) -> Tensor:
        frozen = nn.functional.embedding(ids.clamp(max=self.first - 1), self.frozen)
        trained = nn.functional.embedding((ids - self.first).clamp(min=0), self.rows)
        return torch.where((ids < self.first)[..., None], frozen, trained)
