"""Prompts as tokens and as rows of the token table: what attacks that search for words have in common.

Only tokens that can be typed as words of their own are searched. Joined by spaces they are tokenised as themselves, so
that a prompt that was found works in any prompt box.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from erasec.errors import ErasecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject
    from erasec.base import Images
    from erasec.recipe.concept import Concept

WORD_END = "</w>"  # the end of the names of CLIP's tokens that end a word
BATCH = 64  # prompts that are encoded at once
# Words of a concept's phrases that have no meaning of their own, in prompts from which the concept's words are barred.
FUNCTION_WORDS = frozenset(("a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"))


def typed_tokens(tokenizer: Any, without: Iterable[str] = ()) -> Tensor:
    """The ids (a,) of the tokens that, typed alone, are tokenised as themselves; added tokens are none of them.

    Tokens whose text contains one of the strings ``without`` are left out, in capital or small letters; of strings of
    one or two letters, those that are equal to it.
    """
    added = set(tokenizer.added_tokens_decoder)
    numbers = [number for number in range(len(tokenizer)) if number not in added]
    texts = [tokenizer.decode([number]).strip() for number in numbers]
    again = tokenizer(texts, add_special_tokens=False).input_ids
    barred = [text.lower() for text in without]
    chosen = [
        number
        for number, text, ids in zip(numbers, texts, again, strict=True)
        if ids == [number] and text.isprintable() and not any(_has(text.lower(), part) for part in barred)
    ]
    if not chosen:
        raise ErasecError(
            "the tokenizer has no token that can be typed as a word",
            where=str(tokenizer.name_or_path),
            fix="leave out the probes that search for words",
        )
    return torch.tensor(chosen)


def _has(text: str, part: str) -> bool:
    return part in text if len(part) > 2 else part == text


def sensitive_words(concept: Concept) -> list[str]:
    """The words of the names of a concept, without function words, as a filter of prompts would bar them."""
    phrases = " ".join((*concept.erase, *concept.synonyms)).lower()
    words = "".join(letter if letter.isalnum() else " " for letter in phrases).split()
    return sorted(set(words) - FUNCTION_WORDS)


def draw_words(tokenizer: Any, allowed: Tensor, tokens: int, seed: int) -> str:
    """``tokens`` random words of the tokens ``allowed`` (a,), joined by spaces."""
    chosen = torch.randint(len(allowed), (tokens,), generator=Generator().manual_seed(seed))
    return " ".join(tokenizer.decode([int(number)]).strip() for number in allowed.cpu()[chosen])


@dataclass(frozen=True)
class Layout:
    """Prompts with free places. ``ids`` (n, t) are token ids, and the places are at ``rows`` and ``columns`` (m,)."""

    ids: Tensor
    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        """The number m of free places, in all prompts together."""
        return len(self.rows)

    def filled(self, chosen: Tensor) -> Tensor:
        """The token ids (n, t) with the tokens ``chosen`` (m,) in the free places."""
        return self.ids.index_put((self.rows, self.columns), chosen.to(self.ids))


class Words:
    """The tokenizer and the text encoder of a subject, with gradients to rows that stand for tokens.

    The weights of the encoder get no gradients. ``allowed`` (a,) are the ids of the tokens that attacks may use.
    """

    def __init__(self, subject: Subject, without: Iterable[str] = ()) -> None:
        self.tokenizer, encoder = subject.text_encoder
        self.device = subject.device
        # The subject's own encoder is on the CPU.
        self.encoder = encoder if self.device.type == "cpu" else copy.deepcopy(encoder).to(self.device)
        self.allowed = typed_tokens(self.tokenizer, without).to(self.device)

    @property
    def table(self) -> Tensor:
        """The rows (v, d) of all tokens."""
        rows: Tensor = self.encoder.get_input_embeddings().weight.detach()
        return rows

    @cached_property
    def rows(self) -> Tensor:
        """The rows (a, d) of the allowed tokens."""
        return self.table[self.allowed]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, t) of prompts as pipelines make them, truncated and padded."""
        length = self.tokenizer.model_max_length
        made = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = made.input_ids.to(self.device)
        return ids

    def texts(self, ids: Tensor) -> list[str]:
        """The prompts of token ids (n, t), without their start and what begins with their first end token."""
        texts = []
        for row in ids.tolist():
            stop = row.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in row else len(row)
            texts.append(self.tokenizer.decode(row[1:stop], clean_up_tokenization_spaces=False).strip())
        return texts

    def retokenised(self, ids: Tensor) -> float:
        """The share of prompts (n, t) that, typed as text, are tokenised as the same ids."""
        return float((self.ids(self.texts(ids)) == ids).all(1).float().mean())

    def layout(self, prompts: Sequence[Sequence[int | None]]) -> Layout:
        """Prompts of token ids, in which None is a free place. What does not fit is cut at the end, as pipelines do."""
        tokenizer, places = self.tokenizer, []
        ids = torch.full((len(prompts), tokenizer.model_max_length), tokenizer.pad_token_id)
        for row, prompt in enumerate(prompts):
            kept = list(prompt)[: ids.shape[1] - 2]
            places += [(row, 1 + column) for column, token in enumerate(kept) if token is None]
            tokens = [tokenizer.pad_token_id if token is None else token for token in kept]
            whole = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
            ids[row, : len(whole)] = torch.tensor(whole)
        if not places:
            raise ErasecError(
                "there is no room for a token in any prompt",
                why=f"the prompts fill the {tokenizer.model_max_length} tokens of the text encoder",
                fix="shorten the phrases or the templates of the concept",
            )
        rows, columns = torch.tensor(places, device=self.device).T
        return Layout(ids.to(self.device), rows, columns)

    def prefixed(self, texts: Sequence[str], tokens: int) -> Layout:
        """Prompts with ``tokens`` free places before each of them."""
        return self.layout([[*([None] * tokens), *prompt] for prompt in self._tokens(texts)])

    def interleaved(self, texts: Sequence[str], every: int) -> Layout:
        """Prompts with a free place after the first word end at least ``every`` tokens behind the last free place, and
        one at the end of a prompt that is shorter."""
        prompts: list[list[int | None]] = []
        for prompt in self._tokens(texts):
            made: list[int | None] = []
            since = 0
            for token, name in zip(prompt, self.tokenizer.convert_ids_to_tokens(prompt), strict=True):
                made.append(token)
                since += 1
                if since >= every and name.endswith(WORD_END):
                    made.append(None)
                    since = 0
            prompts.append(made if None in made else [*made, None])
        return self.layout(prompts)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return ids

    def states(self, ids: Tensor, layout: Layout | None = None, free: Tensor | None = None) -> Tensor:
        """Text states (n, t, d) of token ids (n, t), float32 on the device.

        With a ``layout``, the rows ``free`` (m, d) take the place of the table's in its free places, and gradients
        flow to them.
        """
        if layout is None or free is None:
            states: Tensor = self.encoder(ids).last_hidden_state
            return states.float()
        rows = self.table[ids].index_put((layout.rows, layout.columns), free.to(self.table))
        hook = self.encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: rows)
        try:
            states = self.encoder(ids).last_hidden_state
        finally:
            hook.remove()
        return states.float()

    def pooled(self, ids: Tensor, layout: Layout | None = None, free: Tensor | None = None) -> Tensor:
        """The last state at the first end token of each prompt (n, d), as CLIP pools it.

        What follows the end token is not encoded: attention is causal, so that it changes nothing before it.
        """
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        states = self.states(ids[:, : int(ends.max()) + 1], layout, free)
        return states[torch.arange(len(ids), device=ids.device), ends]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text states (n, t, d) of prompts, on the CPU. Equal prompts are encoded once, and none is kept."""
        distinct = list(dict.fromkeys(texts))
        states = torch.cat([self.states(ids).cpu() for ids in self.ids(distinct).split(BATCH)])
        return states[[distinct.index(text) for text in texts]]


def cycled(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts, in turn."""
    return [texts[number % len(texts)] for number in range(count)]


def paint_texts(bench: Bench, subject: Subject, words: Words, texts: Sequence[str], purpose: str) -> Images:
    """Pictures (n, height, width, 3) of as many prompts as the audit paints pictures: the ``texts`` in turn.

    The seeds are those of ``purpose``, so that two calls differ in their texts alone.
    """
    count = bench.settings.images
    subject.texts.update(dict.fromkeys(cycled(texts, count)))
    latents = subject.noise(bench.seeds(purpose, count))
    return subject.decode(bench.paint(subject, words.encode(cycled(texts, count)), latents, purpose))


def paint_found(
    bench: Bench, subject: Subject, words: Words, found: Iterable[Tensor], purpose: str
) -> tuple[NDArray[np.uint8], Tensor]:
    """Pictures (n, k, height, width, 3) of the prompts that a search found, k times one after another, and the last of
    them. Prompts are token ids (p, t).

    The search ends when the selector sees the concept in a picture of each of the n seeds. Without a selector nobody
    can choose a picture, and only the last prompts are painted.
    """
    choices: list[Images] = []
    seen = np.zeros(bench.settings.images, bool)
    last: Tensor | None = None
    for ids in found:
        last = ids
        if bench.selector is not None:
            choices.append(paint_texts(bench, subject, words, words.texts(ids), purpose))
            seen |= bench.selector.sees(choices[-1], [bench.selected_label] * len(seen))
            if seen.all():
                break
    if last is None:
        raise ErasecError(f"{purpose}: the search found no prompt", fix="raise the option steps of the probe")
    if not choices:
        choices.append(paint_texts(bench, subject, words, words.texts(last), purpose))
    return np.stack(choices, 1), last


def project_simplex(rows: Tensor) -> Tensor:
    """The nearest point (m, a) to each row (m, a) whose entries are at least 0 and sum to 1.

    Duchi et al., "Efficient Projections onto the l1-Ball", ICML 2008, figure 1.
    """
    descending = rows.double().sort(1, descending=True).values
    surplus = descending.cumsum(1) - 1
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    support = (descending * counts > surplus).sum(1, keepdim=True)
    shift = surplus.gather(1, support - 1) / support
    return (rows.double() - shift).clamp(min=0).to(rows)


def noised(subject: Subject, targets: Tensor, timesteps: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
    """Noised latents (b, c, h, w) of random ``targets`` (n, c, h, w) at ``timesteps`` (b,), and their noise."""
    chosen = torch.randint(len(targets), (len(timesteps),), generator=rng)
    clean = targets[chosen].to(subject.device)
    noise = torch.randn(clean.shape, generator=rng).to(subject.device)
    return subject.denoiser.add_noise(clean, noise, timesteps.to(subject.device)), noise
