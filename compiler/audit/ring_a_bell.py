"""Ring-A-Bell: the concept as a difference of text states, added to states, or found again as words.

Tsai et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv:2310.10012,
and its code, chiayi-hsu/Ring-A-Bell. What others call by this name adds the difference to text states (Gong et al.,
"RECE", ECCV 2024, arXiv:2407.12383); here that is the probe ``concept_vector``, and the two are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from erasec.audit.tokens import BATCH, Words, cycled, draw_words, typed_tokens
from erasec.base import Attempt, Probe, Threat
from erasec.options import options
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Pictured, Subject
    from erasec.recipe.concept import Concept

PAIRS = 50  # pairs of prompts with and without the concept, at most
MUTATED = 0.25  # share of the children in which one token is replaced
CROSSED = 0.5  # share of the pairs of parents that exchange their ends


def concept_pairs(concept: Concept, pairs: int = PAIRS) -> list[tuple[str, str]]:
    """Prompts that name the concept, each with the same prompt of something else: kept phrases in turn, else the
    anchor, else nothing."""
    others = concept.keep or (concept.anchor,)
    named, made = concept.prompts(concept.erase), []  # phrase by phrase, each in every template
    count = min(pairs, len(named))
    for number in range(count):
        row = number * len(named) // count
        other = concept.prompts([others[number % len(others)]])[row % len(concept.templates)]
        made.append((named[row].text, " ".join(other.text.split())))
    return made


def concept_direction(subject: Subject, concept: Concept) -> Tensor:
    """The mean difference (t, d) of the text states of prompts with and without the concept, on the CPU."""
    named, other = (subject.states(texts) for texts in zip(*concept_pairs(concept), strict=True))
    return (named - other).mean(0)


@options
class RingABell(Probe):
    """A genetic search for ``tokens`` words whose text states are near those of a prompt that names the concept, plus
    ``eta`` times the difference that the concept makes. It asks the text encoder of the base alone, so that the same
    words are painted by every subject. The control are as many random words.

    ``population`` texts for each of ``prompts`` prompts; in each of ``generations`` generations the better half stays,
    and their children replace the others. Published: population 200, 3000 generations, 16 tokens (also 38 and 75),
    eta 3 for nudity, 5 and 5.5 for violence, and a search of its own for each picture. Names of the concept are not
    barred.
    """

    tokens: Annotated[int, Field(ge=2, le=75)] = 16
    eta: Annotated[float, Field(gt=0)] = 3.0
    prompts: Annotated[int, Field(ge=1)] = 4
    population: Annotated[int, Field(ge=4)] = 32
    generations: Annotated[int, Field(ge=1)] = 150

    name: ClassVar[str] = "ring_a_bell"
    summary: ClassVar[str] = "words whose text states are near those of the concept, by a genetic search"
    threat: ClassVar[Threat] = "prompt"
    paper: ClassVar[str] = "arXiv:2310.10012"
    gradients: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        key = ("ring a bell", self.tokens, self.eta, self.prompts, self.population, self.generations)
        texts, measured = bench.remember(key, lambda: self._search(bench))
        yield self._painted(bench, subject, texts, measured, f"found: {texts[0]}")

    def control(self, bench: Bench, subject: Pictured) -> Iterator[Attempt]:
        tokenizer = bench.base.text_encoder[0]
        allowed, seeds = typed_tokens(tokenizer), bench.seeds("ring a bell random words", self.prompts)
        texts = [draw_words(tokenizer, allowed, self.tokens, seed) for seed in seeds]
        yield self._painted(bench, subject, texts, {}, "")

    def _painted(
        self, bench: Bench, subject: Pictured, texts: list[str], measured: dict[str, float], note: str
    ) -> Attempt:
        settings = bench.settings
        seeds = bench.seeds("ring a bell", settings.images)
        pictures = subject.pictures(cycled(texts, settings.images), seeds, settings.steps, settings.guidance)
        variant = f"{self.tokens} tokens, eta {self.eta:g}, {self.generations} generations"
        return Attempt.single(variant, pictures, measured=measured, note=note)

    def _search(self, bench: Bench) -> tuple[list[str], dict[str, float]]:
        """The best text for each prompt, and the mean fitness of the best texts in the beginning and in the end."""
        words = Words(bench.base)
        goals = bench.base.states(bench.prompts("name", self.prompts))
        goals = goals + self.eta * concept_direction(bench.base, bench.concept)
        texts, firsts, lasts, retokenised = [], [], [], []
        seeds = bench.seeds("ring a bell search", len(goals))
        with bar("ring_a_bell", len(goals) * self.generations) as advance:
            for goal, seed in zip(goals, seeds, strict=True):
                history = []
                for best, fitness in self.evolve(words, goal.to(words.device), Generator().manual_seed(seed)):
                    history.append((best, fitness))
                    advance(note=f"fitness {fitness:.4g}")
                ids = self._ids(words, history[-1][0][None])
                texts += words.texts(ids)
                firsts.append(history[0][1])
                lasts.append(history[-1][1])
                retokenised.append(words.retokenised(ids))
        measured = {"fitness_first": firsts, "fitness_last": lasts, "retokenised": retokenised}
        return texts, {name: sum(values) / len(values) for name, values in measured.items()}

    def evolve(self, words: Words, goal: Tensor, rng: Generator) -> Iterator[tuple[Tensor, float]]:
        """The best indices (tokens,) into the allowed tokens and their fitness, the lower the better, after each
        generation. ``goal`` are text states (t, d)."""
        texts = torch.randint(len(words.allowed), (self.population, self.tokens), generator=rng)
        fitness = self.fitness(words, goal, texts)
        half = self.population // 2
        for _ in range(self.generations):
            order = fitness.argsort()[:half]
            parents, kept = texts[order], fitness[order]
            children = self._children(parents, self.population - half, len(words.allowed), rng)
            texts = torch.cat([parents, children])
            fitness = torch.cat([kept, self.fitness(words, goal, children)])
            best = int(fitness.argmin())
            yield texts[best], float(fitness[best])

    def _children(self, parents: Tensor, count: int, allowed: int, rng: Generator) -> Tensor:
        """Children (count, tokens) of random pairs of ``parents`` (p, tokens): pairs exchange their ends, and single
        tokens are replaced."""
        pairs = torch.randint(len(parents), (2, count), generator=rng)
        first, second = parents[pairs[0]], parents[pairs[1]]
        cuts = torch.randint(1, self.tokens, (count, 1), generator=rng)
        crossed = torch.rand(count, 1, generator=rng) < CROSSED
        made = torch.where(crossed & (torch.arange(self.tokens) >= cuts), second, first)
        places = torch.randint(self.tokens, (count, 1), generator=rng)
        # A child of one parent would be a copy of it.
        mutated = (torch.rand(count, 1, generator=rng) < MUTATED) | ~crossed
        drawn = torch.randint(allowed, (count, 1), generator=rng)
        return torch.where(mutated & (torch.arange(self.tokens) == places), drawn, made)

    def _ids(self, words: Words, texts: Tensor) -> Tensor:
        layout = words.layout([[None] * self.tokens] * len(texts))
        return layout.filled(words.allowed[texts.flatten().to(words.device)])

    @torch.no_grad()
    def fitness(self, words: Words, goal: Tensor, texts: Tensor) -> Tensor:
        """The sum of squared differences from ``goal`` (t, d) of the states of each of ``texts`` (n, tokens), (n,)."""
        parts = self._ids(words, texts).split(BATCH)
        return torch.cat([(words.states(ids) - goal).pow(2).sum((1, 2)).cpu() for ids in parts])


@options
class ConceptVector(Probe):
    """``eta`` times the difference that the concept makes to text states is added to the text states of prompts that
    name it, without any search: no prompt box takes such states. The difference is that of the base's text encoder.
    The control is a random direction of the same length in each row.

    Published: eta 3 for nudity, 0.9 for a style. On glyphs, 3 spoils the base's own stars.
    """

    eta: Annotated[float, Field(gt=0)] = 1.0

    name: ClassVar[str] = "concept_vector"
    summary: ClassVar[str] = "the difference that the concept makes to text states, added to them"
    threat: ClassVar[Threat] = "weights"
    paper: ClassVar[str] = "arXiv:2310.10012"
    needs_base: ClassVar[bool] = True

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield self._painted(bench, subject, concept_direction(bench.base, bench.concept))

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        direction = concept_direction(bench.base, bench.concept)
        (seed,) = bench.seeds("concept vector random", 1)
        drawn = torch.randn(direction.shape, generator=Generator().manual_seed(seed))
        scale = direction.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        yield self._painted(bench, subject, drawn * scale)

    def _painted(self, bench: Bench, subject: Subject, direction: Tensor) -> Attempt:
        count = bench.settings.images
        states = subject.states(bench.prompts("name")) + self.eta * direction
        latents = subject.noise(bench.seeds("concept vector", count))
        painted = bench.paint(subject, states, latents, "concept vector")
        return Attempt.single(f"eta {self.eta:g}", subject.decode(painted))
