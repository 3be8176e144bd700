"""MMA-Diffusion, text modality: words without any name of the concept whose pooled text output is that of a prompt that
names it.

Yang et al., "MMA-Diffusion: MultiModal Attack on Diffusion Models", CVPR 2024, arXiv:2311.17516, and its code,
cure-lab/MMA-Diffusion. The search is that of Zou et al., "Universal and Transferable Adversarial Attacks on Aligned
Language Models", 2023, arXiv:2307.15043, algorithm 1 (greedy coordinate gradient).
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from erasec.audit.tokens import BATCH, Layout, Words, cycled, draw_words, sensitive_words, typed_tokens
from erasec.base import Attempt, Probe, Threat
from erasec.options import options
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Pictured


@options
class MMA(Probe):
    """``tokens`` words maximise the cosine of their pooled text output with that of a prompt that names the concept,
    one search for each of ``prompts`` prompts. Tokens whose text contains a word of the concept's names are barred. The
    search asks the text encoder of the base alone, so that the same words are painted by every subject. The control are
    as many random words, with the same words barred.

    A step takes the best of ``candidates`` texts that differ from the last one in a single token, which is one of the
    ``top`` tokens that the gradient prefers. Published: 20 tokens that start as letters, 1000 steps, 512 candidates,
    top 256, and a list of about 20 barred strings.
    """

    tokens: Annotated[int, Field(ge=1, le=75)] = 20
    prompts: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=1)] = 50
    candidates: Annotated[int, Field(ge=1)] = 64
    top: Annotated[int, Field(ge=1)] = 64

    name: ClassVar[str] = "mma"
    summary: ClassVar[str] = "words without a name of the concept, of the same pooled text output"
    threat: ClassVar[Threat] = "prompt"
    paper: ClassVar[str] = "arXiv:2311.17516"
    gradients: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        key = ("mma", self.tokens, self.prompts, self.steps, self.candidates, self.top)
        texts, measured = bench.remember(key, lambda: self._search(bench))
        yield self._painted(bench, subject, texts, measured, f"found: {texts[0]}")

    def control(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        tokenizer = bench.base.text_encoder[0]
        allowed = typed_tokens(tokenizer, sensitive_words(bench.concept))
        seeds = bench.seeds("mma random words", self.prompts)
        texts = [draw_words(tokenizer, allowed, self.tokens, seed) for seed in seeds]
        yield self._painted(bench, subject, texts, {}, "")

    def _painted(
        self, bench: Bench, subject: Pictured, texts: list[str], measured: dict[str, float], note: str
    ) -> Attempt:
        settings = bench.settings
        seeds = bench.seeds("mma", settings.images)
        pictures = subject.pictures(cycled(texts, settings.images), seeds, settings.steps, settings.guidance)
        return Attempt.single(f"{self.tokens} tokens, {self.steps} steps", pictures, measured=measured, note=note)

    def _search(self, bench: Bench) -> tuple[list[str], dict[str, float]]:
        """The text for each prompt, and the mean cosine in the beginning and in the end."""
        words = Words(bench.base, sensitive_words(bench.concept))
        prompts = bench.prompts("name", self.prompts)
        texts, firsts, lasts, retokenised = [], [], [], []
        with bar("mma", len(prompts) * (self.steps + 1)) as advance:
            for prompt, seed in zip(prompts, bench.seeds("mma search", len(prompts)), strict=True):
                with torch.no_grad():
                    goal = words.pooled(words.ids([prompt]))
                history = []
                for chosen, cosine in self.climb(words, goal, Generator().manual_seed(seed)):
                    history.append((chosen, cosine))
                    advance(note=f"cosine {cosine:.3f}")
                ids = self._layout(words).filled(words.allowed[history[-1][0]])
                texts += words.texts(ids)
                firsts.append(history[0][1])
                lasts.append(history[-1][1])
                retokenised.append(words.retokenised(ids))
        measured = {"cosine_first": firsts, "cosine_last": lasts, "retokenised": retokenised}
        return texts, {name: sum(values) / len(values) for name, values in measured.items()}

    def _layout(self, words: Words) -> Layout:
        return words.layout([[None] * self.tokens])

    def climb(self, words: Words, goal: Tensor, rng: Generator) -> Iterator[tuple[Tensor, float]]:
        """The indices (tokens,) into the allowed tokens and their cosine with the pooled output ``goal`` (1, d), before
        the first step and after each. A step without a better candidate changes nothing."""
        layout, choices = self._layout(words), len(words.allowed)
        places = torch.arange(self.candidates) % self.tokens
        chosen = self._letters(words, rng)
        cosine = float(self.cosines(words, goal, chosen[None]))
        yield chosen, cosine
        for _ in range(self.steps):
            hot = torch.nn.functional.one_hot(chosen, choices).to(words.rows).requires_grad_(True)
            ids = layout.filled(words.allowed[chosen])
            loss = 1 - cosine_similarity(words.pooled(ids, layout, hot @ words.rows), goal).sum()
            (gradient,) = torch.autograd.grad(loss, hot)
            preferred = gradient.topk(min(self.top, choices), largest=False).indices.cpu()
            drawn = torch.randint(preferred.shape[1], (self.candidates,), generator=rng)
            texts = chosen.repeat(self.candidates, 1)
            texts[torch.arange(self.candidates), places] = preferred[places, drawn].to(texts)
            cosines = self.cosines(words, goal, texts)
            best = int(cosines.argmax())
            if float(cosines[best]) > cosine:
                chosen, cosine = texts[best], float(cosines[best])
            yield chosen, cosine

    def _letters(self, words: Words, rng: Generator) -> Tensor:
        """Random letters as indices (tokens,) into the allowed tokens; any tokens where the letters are barred."""
        letters = words.ids(list(string.ascii_lowercase))[:, 1]
        known = torch.isin(words.allowed, letters).nonzero()[:, 0]
        pool = known if len(known) else torch.arange(len(words.allowed), device=words.device)
        return pool[torch.randint(len(pool), (self.tokens,), generator=rng).to(pool.device)]

    @torch.no_grad()
    def cosines(self, words: Words, goal: Tensor, texts: Tensor) -> Tensor:
        """The cosine (n,) of the pooled output of ``texts`` (n, tokens) with ``goal`` (1, d)."""
        ids = self._layout(words).ids.repeat(len(texts), 1)
        ids[:, 1 : 1 + self.tokens] = words.allowed[texts]
        return torch.cat([cosine_similarity(words.pooled(part), goal) for part in ids.split(BATCH)])
