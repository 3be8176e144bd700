"""Random words before prompts that name the concept: what a search for words must do better than.

The random attacker of Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To
Generate Unsafe Images ... For Now", ECCV 2024, arXiv:2310.11868, and of its code, OPTML-Group/Diffusion-MU-Attack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator

from erasec.audit.bench import stack_choices
from erasec.audit.subject import Subject
from erasec.audit.tokens import Layout, Words, draw_words, paint_texts, typed_tokens
from erasec.base import Attempt, Probe, Threat
from erasec.errors import ErasecError
from erasec.options import options

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Pictured


@options
class Prefix(Probe):
    """``tokens`` random words before each prompt that names the concept, ``candidates`` times with the same seed, the
    best one counted. The control are random words before prompts of other things.

    Published: 3 tokens for objects and styles, 5 for nudity, and 40 candidates.
    """

    tokens: Annotated[int, Field(ge=1, le=20)] = 3
    candidates: Annotated[int, Field(ge=1)] = 8

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "random words before prompts that name the concept"
    threat: ClassVar[Threat] = "prompt"
    paper: ClassVar[str] = "arXiv:2310.11868"
    gradients: ClassVar[bool] = False

    def attack(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        best, settings, prompts = self._best(bench, subject, "name"), bench.settings, bench.prompts("name")
        seeds = bench.seeds("prefix name", len(prompts))
        yield replace(best, plain=subject.pictures(prompts, seeds, settings.steps, settings.guidance))

    def control(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        yield self._best(bench, subject, "keep")

    def _best(self, bench: Bench, subject: Pictured, group: str) -> Attempt:
        settings, prompts = bench.settings, bench.prompts(group)
        tokenizer = tokenizer_of(bench)
        allowed = typed_tokens(tokenizer)
        choices = []
        for number in range(self.candidates):
            seeds = bench.seeds(f"prefix words {number}", len(prompts))
            texts = [
                f"{draw_words(tokenizer, allowed, self.tokens, seed)} {prompt}"
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            painted = bench.seeds(f"prefix {group}", len(prompts))
            choices.append(subject.pictures(texts, painted, settings.steps, settings.guidance))
        plural = "s" if self.tokens > 1 else ""
        return Attempt(f"{self.tokens} token{plural}, best of {self.candidates}", stack_choices(choices))


def tokenizer_of(bench: Bench) -> Any:
    """The tokenizer of the first subject that has one: a runtime's folder is not opened for it.

    Raises ErasecError where no subject has one.
    """
    subject = next((subject for subject in bench.subjects.values() if isinstance(subject, Subject)), None)
    if subject is None:
        raise ErasecError(
            "no subject has a tokenizer here",
            why="the words are drawn from the tokens of a model that torch can load",
            fix="name the model before the edit: --base MODEL",
        )
    return subject.text_encoder[0]


def random_places(
    bench: Bench, subject: Subject, words: Words, layout: Layout, count: int, purpose: str, variant: str
) -> Attempt:
    """The random control of an attack that searches for words in the free places of ``layout``: ``count`` random draws
    of them, painted with the seeds of ``purpose``, which is that of the attack."""
    choices = []
    # Without a selector nobody can choose a picture, so that one is painted, as of the attack.
    for seed in bench.seeds(f"{purpose} random words", count if bench.selector else 1):
        rng = Generator().manual_seed(seed)
        drawn = torch.randint(len(words.allowed), (len(layout),), generator=rng).to(words.device)
        texts = words.texts(layout.filled(words.allowed[drawn]))
        choices.append(paint_texts(bench, subject, words, texts, purpose))
    return Attempt(variant, stack_choices(choices))
