"""TRCE: the end token of malicious prompts is remapped, then the early denoising steps are steered away from them.

Chen, Guo, Wang et al.: "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models", ICCV 2025,
arXiv:2503.07389.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Work
from erasec.closed_form.base import ClosedForm
from erasec.closed_form.token_rows import erased_rows, goal_prompts
from erasec.errors import ErasecError
from erasec.options import options
from erasec.recipe.goals import ANOTHER_GOAL
from erasec.training.base import Learned, Need, networks, sampling, trainable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.banks import Bank
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses


@options
class Remap(ClosedForm):
    """Closed-form remap of the first end token: for each phrase in each template, it becomes that of the goal in the
    same template. All states of the kept prompts are preserved.

    The published code finds the end token by counting words; here it is located by the tokenizer. It preserves the
    states of COCO captions, with a weight that it applies twice and no ridge, which leaves the system near singular.
    Here the kept prompts are preserved with the weight of the erased ones, and the ridge is that of ``ClosedForm``; to
    preserve captions as well, give a prior.
    """

    name: ClassVar[str] = "trce.remap"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "stage 1 of TRCE: closed-form remap of the end token's keys and values"
    when: ClassVar[str] = "many phrases of one policy, whose meaning the end token holds; the first half of trce"
    limits: ClassVar[str] = "prompts that imply the concept in words far from the given phrases may still draw it"

    def rows_to_erase(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased_rows(model, concept, "eot", stream)


def hinge(from_safe: Tensor, from_unsafe: Tensor, beta: float, margin: float) -> Tensor:
    """The mean over n rows of max(0, beta (MSE to safe - MSE to unsafe + margin)).

    ``from_safe`` and ``from_unsafe`` (n, ...) are the differences of the predictions from the two targets. The squares
    of the prediction cancel: its gradient is -2 beta (safe - unsafe) / N until the margin is met, and 0 from then on.
    """
    excess = (from_safe.square() - from_unsafe.square()).flatten(1).mean(1)
    return (beta * (excess + margin)).clamp(min=0).mean()


@options
class Steer(Learned):
    """Training that steers the early denoising steps of the concept's prompts towards its goal.

    It trains on ``trajectories`` trajectories of the concept's prompts, sampled in ``sample_steps`` steps with
    ``guidance``, in the first ``early_fraction`` of the steps. The safe target is the prediction for the goal in the
    same template, and the unsafe target that for the concept; both are extrapolated away from the unconditional
    prediction by the factor ``push``. The loss is a hinge of weight ``beta``: the predictions with the concept's prompt
    and with the empty one must be nearer to the safe target than to the unsafe one, by ``margin`` (see ``hinge``). The
    trajectories and targets come from the original model, without earlier edits. With a large push, such as the
    published 15, the border between the targets depends mainly on their distances from the unconditional prediction.
    The published fraction of steps, 0.52 or 26 of 50, is for latents of 64 x 64; smaller latents take shape later. Of a
    rectified flow the differences are those of velocities.

    ``preserve`` is the weight of a loss that keeps the predictions on unprompted trajectories, and ``keep`` that of one
    on trajectories of kept prompts, both at those of the given model. ``reference`` reproduces faults of the published
    code: gradients are never set to zero, latents after a step are paired with the timestep before it, and
    trajectories are used in the order of their prompts.

    The defaults are the published settings for explicit content, three epochs of 100 trajectories, with one correction.
    The published rate of 1e-6 was chosen for gradients that add up over all steps. Here they are set to zero after
    each step, so that the rate is ten times higher; ``reference`` with 1e-6 gives the published updates. The published
    code preserves four unprompted trajectories in a step, here it is a batch of them. ``keep`` is 0, as in the paper.
    """

    steps: Annotated[int, Field(ge=1)] = 300
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 1
    push: Annotated[float, Field(ge=0)] = 15.0
    margin: Annotated[float, Field(ge=0)] = 0.01
    beta: Annotated[float, Field(gt=0)] = 1.0
    early_fraction: Annotated[float, Field(gt=0, le=1)] = 0.52
    guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectories: Annotated[int, Field(ge=1)] = 100
    sample_steps: Annotated[int, Field(ge=1)] = 50
    preserve: Annotated[float, Field(ge=0)] = 100.0
    keep: Annotated[float, Field(ge=0)] = 0.0
    reference: bool = False

    needs: ClassVar[tuple[Need, ...]] = ("unconditional",)
    name: ClassVar[str] = "trce.steer"
    renamed: ClassVar[dict[str, str]] = {"path": "sample_steps", "early": "early_fraction"}
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "stage 2 of TRCE: the early denoising steps are trained away from the concept"
    when: ClassVar[str] = "after trce.remap or another pass on cross-attention, for prompts that imply the concept"
    limits: ClassVar[str] = (
        "alone it leaves part of the concept in prompts that name it; image-to-image from late steps is not steered"
    )

    def sites(self, model: Model) -> tuple[Site, ...]:
        def selects(site: Site) -> bool:
            # In joint attention, the picture's own queries, keys, values and outputs.
            return site.attn in ("self", "joint") or (site.attn, site.proj) == ("cross", "q")

        return trainable(model, selects, self.rank, self.needs)

    def part(self) -> slice:
        """The steps of a trajectory that are steered."""
        return slice(0, max(1, round(self.early_fraction * self.sample_steps)))

    def work(self, model: Model, concept: Concept) -> Work:
        part = self.part()
        early = len(range(self.sample_steps)[part])
        work = self.reads(model, concept, 3 * self.trajectories) + sampling(self.trajectories, early, self.guidance)
        work += Work(rows=self.trajectories * early)  # the predictions for the goals
        losses = 2.0  # each row of the erasing loss is predicted twice, in one call
        if self.preserve:
            work += sampling(self.trajectories, self.sample_steps, 1.0, scored=False)
            losses += 1
        if self.keep and concept.keep:
            work += sampling(self.trajectories, self.sample_steps, self.guidance)
            losses += 1
        return work + self.training(losses * self.batch, losses - 1)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        # The original network is released before the given model is loaded, so that there are never two in memory.
        from erasec.training import banks
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student

        erased, safe, unsafe = self._targets(Denoiser(model.original, context), concept, context.seed)
        denoiser = Denoiser(model, context)
        kept = banks.concept_prompts(concept, concept.keep)
        preservation: dict[str, tuple[float, Callable[[Generator], Tensor]]] = {}
        for name, weight, prompts, guidance in (
            ("preserve", self.preserve, [""], 1.0),
            ("keep", self.keep, kept, self.guidance),
        ):
            if weight and prompts:
                seed = context.seed + 1 + len(preservation)
                bank = self._sample(denoiser, banks.spread_prompts(prompts, self.trajectories, seed), seed, guidance)
                preservation[f"loss {name}"] = weight, banks.preservation_loss(denoiser, bank, self.batch, noise=True)
        student = Student(networks(denoiser), self.sites(model), self.rank, context.seed)
        device = denoiser.device

        def loss(rng: Generator, step: int) -> Losses:
            index = self._draw(erased, rng, step)
            # Each row is predicted twice: with its prompt and with the empty one.
            timesteps = erased.timesteps[index].to(device).repeat(2)
            prompts = erased.texts(index) + [""] * len(index)
            predictions = banks.predict_rows(denoiser, erased, index.repeat(2), prompts)
            from_safe, from_unsafe = (
                denoiser.as_noise(predictions - target[index].to(device).repeat(2, 1, 1, 1), timesteps)
                for target in (safe, unsafe)
            )
            losses = {"loss erase": hinge(from_safe, from_unsafe, self.beta, self.margin)}
            return losses | {name: weight * preserve(rng) for name, (weight, preserve) in preservation.items()}

        objective = Objective(student.parameters, self.lr, loss, accumulate=self.reference, with_step=True)
        return self.edit(student, self.fit([objective], student, model, concept, context), model, concept)

    def _targets(self, original: Denoiser, concept: Concept, seed: int) -> tuple[Bank, Tensor, Tensor]:
        """A bank of the concept's trajectories, and the safe and unsafe targets of its rows, (m, c, h, w).

        Raises ErasecError where the concept has no goal other than itself.
        """

        from erasec.training import banks

        phrases = [phrase for phrase in concept.phrases if concept.goal(phrase) != phrase]
        goals = [prompt.text for prompt in goal_prompts(concept, phrases)]
        goal_of = dict(zip(banks.concept_prompts(concept, phrases), goals, strict=True))
        if not goal_of:
            raise ErasecError(
                f"{self.name}: the concept {concept.name} becomes itself",
                why="the goal of each phrase is that phrase",
                fix=ANOTHER_GOAL,
            )
        prompts = banks.spread_prompts(list(goal_of), self.trajectories, seed)
        if self.reference:
            prompts = sorted(prompts, key=list(goal_of).index)
        erased = self._sample(original, prompts, seed, self.guidance, self.part())
        goal_bank = replace(erased, prompts=tuple(goal_of[prompt] for prompt in prompts))
        goal_predictions = banks.predict_bank(original, goal_bank)
        safe, unsafe = (
            prediction + self.push * (prediction - erased.unconditional)
            for prediction in (goal_predictions, erased.predictions)
        )
        return erased, safe, unsafe

    def _sample(
        self, denoiser: Denoiser, prompts: list[str], seed: int, guidance: float, part: slice = slice(None)
    ) -> Bank:
        """A bank of one trajectory per prompt; in the ``reference``, of the latents after each step."""

        import torch

        from erasec.training import banks

        if not self.reference:
            return banks.sample_bank(denoiser, prompts, seed, self.sample_steps, guidance, part)
        until = max(0, part.stop or 0)
        seeds = banks.training_seeds(seed, len(prompts))
        trajectories = denoiser.sample(prompts, seeds, self.sample_steps, guidance, until=until)
        after = torch.cat([trajectories.latents[:, 1:], trajectories.final[:, None]], 1)
        return banks.score_trajectories(denoiser, prompts, replace(trajectories, latents=after), part)

    def _draw(self, erased: Bank, rng: Generator, step: int) -> Tensor:
        """Indices (batch,) of random rows; in the ``reference``, random steps of one trajectory after another."""

        import torch

        if not self.reference:
            return erased.draw(self.batch, rng)
        count = len(erased.prompts)
        length = len(erased.latents) // count
        trajectory = torch.arange(step * self.batch, (step + 1) * self.batch) % count
        return trajectory * length + torch.randint(length, (self.batch,), generator=rng)


@options
class Trce(Steer):
    """``trce.remap`` and then ``trce.steer`` on its result, as one edit.

    The options are those of ``trce.steer``. ``remap_scale``, ``remap_keep`` and ``remap_ridge`` are scale, keep and
    ridge of ``trce.remap``. Its ``prior``, ``prior_weight`` and ``routes`` have the same names here.
    """

    remap_scale: Annotated[float, Field(gt=0)] = 1.0
    remap_keep: Annotated[float, Field(ge=0)] = 1.0
    remap_ridge: Annotated[float, Field(ge=0)] = 1e-3
    prior: str = ""
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    routes: Literal["all", "tokens"] = "all"

    name: ClassVar[str] = "trce"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = (
        "both stages of TRCE: closed-form remap of the end token, then training of the early denoising steps"
    )
    when: ClassVar[str] = "explicit content and other policies: many phrases, and prompts that only imply them"
    limits: ClassVar[str] = "image-to-image from late steps is not steered"

    def _remap(self) -> Remap:
        return Remap(
            scale=self.remap_scale,
            keep=self.remap_keep,
            ridge=self.remap_ridge,
            prior=self.prior,
            prior_weight=self.prior_weight,
            routes=self.routes,
        )

    def _steer(self) -> Steer:
        return Steer(**{field.name: getattr(self, field.name) for field in fields(Steer)})

    def work(self, model: Model, concept: Concept) -> Work:
        return self._remap().work(model, concept) + super().work(model, concept)

    def sites(self, model: Model) -> tuple[Site, ...]:
        return (*self._remap().sites(model), *super().sites(model))

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        first = self._remap().solve(model, concept, context)
        second = self._steer().solve(model.with_edit(first), concept, context)
        deltas = {**first.deltas, **second.deltas}
        stats = {f"remap {key}": value for key, value in first.stats.items()} | dict(second.stats)
        return replace(second, deltas=deltas, by=self.name, params=asdict(self), stats=stats)
