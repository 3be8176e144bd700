"""Harden: adversarial training of what draws a concept, against text states that are searched while it trains.

An edit of the keys and values of cross-attention, also one without an inverse (``project``), leaves a denoiser that can
still draw the concept: for text states that are trained for long, and from noised pictures. This pass trains everything
but the keys and values. In every step text states are searched that make the network predict what the original
predicted for the concept; on these, on the concept's prompts and on the empty prompt the network is trained to predict
the concept's goal.

It is adversarial training in the space of text states, as in Receler (Huang et al., ECCV 2024, arXiv:2311.17717) and
RACE (Kim et al., arXiv:2405.16341). The searched states are kept from step to step, so that a search is as long as the
training (Shafahi et al., "Adversarial training for free!", NeurIPS 2019, arXiv:1904.12843). Latents and targets come
from the original model, once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Check, Work
from erasec.options import options
from erasec.training.base import HEADS, MEASURE_EVERY, Learned, Need, networks, sampling, trainable

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.banks import Bank
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Curves, Losses

CONVERGED = 2  # measurements in a row at or below the limit, after which the training stops
FINAL_SEED = 977  # the last search has a seed of its own
NOISED = 20  # noised versions of the picture of each trajectory


@options
class Harden(Learned):
    """Adversarial training of the image side. It follows ``project``, and edits none of the same tensors.

    ``train`` selects the tensors: "attention" is self-attention with the queries and outputs of cross-attention, and
    "image" everything but the keys and values of cross-attention, the output head and the time embedding. In joint
    attention the keys and values of the text's stream are left out, and the embedding of the text everywhere.

    ``searches`` text states are searched at the same time, with ``search_steps`` steps of the rate ``search_lr`` for
    each step of training; in every fourth of them one row repeats. Half start at the concept's prompts, and half near
    the empty prompt. After every ``restart`` steps one of them starts anew. The search minimises the squared distance
    to the original's prediction for the concept, and the training that to its prediction for the concept's goal, led
    away from the concept by the factor ``push``. The latents are those of ``trajectories`` trajectories of the concept,
    sampled in ``sample_steps`` steps with ``guidance``, and noised pictures. ``keep`` is the weight of the loss that
    keeps the original's predictions for kept prompts and for the empty prompt, on trajectories of their own.

    The training stops where the searched states recover at most ``recovered`` of the concept, and each of them has
    started anew: 1 is the original's prediction for it, and 0 as far from it as the unconditional prediction, or
    farther. At the end a new search of ``final_steps`` steps attacks the result, and the build fails where that
    recovers more. This tells an edit that left the concept in place, and is no proof: on glyphs it reads 0 from the
    first measurement on. The audit paints pictures of longer searches.

    The method is ours. Its defaults for Stable Diffusion are the learning rate and the number of steps of published
    methods, ``push`` and ``keep`` as chosen on glyphs, and the search of the audit's probe ``free_states``. Nobody has
    tried them on Stable Diffusion.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 4
    train: Literal["attention", "image"] = "image"
    searches: Annotated[int, Field(ge=1)] = 8
    search_steps: Annotated[int, Field(ge=0)] = 2
    search_lr: Annotated[float, Field(gt=0)] = 0.02
    restart: Annotated[int, Field(ge=1)] = 25
    final_steps: Annotated[int, Field(ge=1)] = 200
    push: Annotated[float, Field(ge=0)] = 0.25
    guidance: Annotated[float, Field(gt=1)] = 3.0
    trajectories: Annotated[int, Field(ge=1)] = 64
    sample_steps: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[float, Field(ge=0)] = 100.0
    recovered: Annotated[float, Field(gt=0, lt=1)] = 0.15

    needs: ClassVar[tuple[Need, ...]] = ("unconditional",)
    name: ClassVar[str] = "harden"
    paper: ClassVar[str] = "arXiv:2311.17717"
    summary: ClassVar[str] = "adversarial training of the image side, against searched text states"
    when: ClassVar[str] = "after project, where people with the published weights must not bring the concept back"
    limits: ClassVar[str] = (
        "It is trained against searches of text states: inpainting, inverted pictures and fine-tuning are other ways."
    )

    def sites(self, model: Model) -> tuple[Site, ...]:
        def selects(site: Site) -> bool:
            if site.proj == "embed" or (site.attn in ("cross", "context") and site.proj in ("k", "v")):
                return False
            return (
                site.attn in ("self", "cross", "joint", "context")
                if self.train == "attention"
                else not site.key.startswith(HEADS)
            )

        return trainable(model, selects, self.rank, self.needs)

    def work(self, model: Model, concept: Concept) -> Work:
        bank = sampling(self.trajectories, self.sample_steps, self.guidance)
        rows = self.trajectories * (self.sample_steps + NOISED)
        targets = Work(rows=rows + 2 * NOISED * self.trajectories)
        losses = 2 + bool(self.keep)
        calls = losses + self.search_steps
        # One step of the search follows another; the losses of the training have one graph.
        training = replace(self.training(calls * self.batch, calls), graph_rows=losses * self.batch)
        last = Work(trained_rows=self.final_steps * self.batch, trained_calls=self.final_steps)
        banks = bank + bank if self.keep else bank
        return self.reads(model, concept, 3 * self.trajectories) + banks + targets + training + last

    def checks(self, edit: Edit) -> tuple[Check, ...]:
        """Whether the last search recovers at most ``recovered`` of the concept."""
        how = (
            f"the most that one of {self.searches} text states recovers of the original's prediction for the concept, "
            f"after a new search of {self.final_steps} steps, on latents that it did not use; the training took "
            f"{edit.stats['steps']:.0f} of {self.steps} steps"
        )
        name = f"{self.name}/{edit.concepts[0]}"
        return (Check.at_most(name, edit.stats["recovered_by_search"], self.recovered, how),)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        # The original network is released before the given model is loaded, so that there are never two in memory.
        import torch

        from erasec.training import banks
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective, fit
        from erasec.training.state_search import StateSearch
        from erasec.training.student import Student

        attacked, target, kept = self._targets(Denoiser(model.original, context), concept, context.seed)
        denoiser = Denoiser(model, context)
        student = Student(networks(denoiser), self.sites(model), self.rank, context.seed)
        device = denoiser.device
        keep_loss = banks.preservation_loss(denoiser, kept, self.batch) if kept else None
        prompts = banks.concept_prompts(concept, concept.phrases)
        search = StateSearch(denoiser, attacked, prompts, self.searches, self.batch, context.seed, self.restart)

        def erase(rng: Generator) -> Losses:
            index = search.draw(rng)
            # Each row is predicted with a searched state, and with its own prompt or the empty one.
            unprompted = torch.rand(self.batch, generator=rng) < 0.5
            texts = ["" if no else text for no, text in zip(unprompted.tolist(), attacked.texts(index), strict=True)]
            states = torch.cat([search.states(search.members(rng)).detach(), denoiser.states(texts)])
            latents, goals = (values[index].to(device).repeat(2, 1, 1, 1) for values in (attacked.latents, target))
            timesteps = attacked.timesteps[index].to(device).repeat(2)
            error = denoiser.as_noise(denoiser.predict(latents, timesteps, states) - goals, timesteps)
            losses = {"loss erase": error.square().mean()}
            return losses | ({"loss keep": self.keep * keep_loss(rng)} if keep_loss else {})

        objectives = [Objective(student.parameters, self.lr, erase)]
        if self.search_steps:
            searched = {"states": search.free}
            objectives.insert(0, Objective(searched, self.search_lr, search.loss, self.search_steps, with_step=True))
        run = self.fit(
            objectives, student, model, concept, context, measure=search.after_step, stop_rule=self._converged
        )
        seed = context.seed + FINAL_SEED
        last = StateSearch(denoiser, attacked, prompts, self.searches, self.batch, seed)
        title = f"{self.name} {concept.name}: last search"
        fit(title, [Objective({"states": last.free}, self.search_lr, last.loss)], steps=self.final_steps, seed=seed)
        edit = self.edit(student, run, model, concept)
        return replace(edit, stats={**edit.stats, "recovered_by_search": last.recovered()})

    def _targets(self, original: Denoiser, concept: Concept, seed: int) -> tuple[Bank, Tensor, Bank | None]:
        """Latents that show the concept, with the original's predictions; the targets of their rows (m, c, h, w); and
        latents of kept prompts."""
        from erasec.training import banks

        prompts = banks.spread_prompts(banks.concept_prompts(concept, concept.phrases), self.trajectories, seed)
        attacked = banks.sample_attacked(original, prompts, seed, self.sample_steps, self.guidance, NOISED)
        target = banks.esd_target(original, concept, attacked, self.push, "anchor")
        if not self.keep:
            return attacked, target, None
        kept = ["", *banks.concept_prompts(concept, concept.keep)]
        spread = banks.spread_prompts(kept, self.trajectories, seed + 1)
        return attacked, target, banks.sample_bank(original, spread, seed + 1, self.sample_steps, self.guidance)

    def _converged(self, curves: Curves) -> str:
        """The reason to stop: the last measurements are all within the limit, and every state was searched anew."""
        measured = curves.get("recovered", ())
        last = measured[-CONVERGED:]
        anew = len(measured) * MEASURE_EVERY >= self.restart * self.searches
        enough = anew and len(last) == CONVERGED and max(last) <= self.recovered
        return f"the searched states recover at most {max(last):.0%}" if enough else ""
