"""TRCE: a malicious prompt's meaning is moved where it gathers, then denoising is turned where that first takes shape.

Chen, Guo, Wang et al.: "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models", ICCV 2025,
arXiv:2503.07389.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from erasec.closed_form.base import ClosedForm, erased, goals
from erasec.errors import ErasecError
from erasec.training import base as learned
from erasec.training.base import Learned
from erasec.training.denoiser import Denoiser, Student
from erasec.training.loop import Turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.base import Bank
    from erasec.training.loop import Losses


@dataclass(frozen=True)
class Remap(ClosedForm):
    """The first end token of every phrase in every template becomes that of its counterpart in the same template. (The
    reference counts words to find it; here it is the token's true place.) All states of the kept prompts stay."""

    name: ClassVar[str] = "trce.remap"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "stage 1 of TRCE: closed-form remap of the end token's keys and values"
    when: ClassVar[str] = "many phrases of one policy, whose meaning gathers in the end token; the first half of trce"
    limits: ClassVar[str] = "prompts that imply the concept in words far from the given phrases may still draw it"

    def table(self, model: Model, concept: Concept, stream: str) -> tuple[Tensor, Tensor]:
        return erased(model, concept, "eot", stream)


def hinge(from_safe: Tensor, from_unsafe: Tensor, beta: float, margin: float) -> Tensor:
    """max(0, beta (MSE from safe - MSE from unsafe + margin)), mean over rows, of a prediction's differences (n, ...).

    The prediction's squares cancel: its gradient is -2 beta (safe - unsafe) / N until the margin is met, and then none.
    """
    further = (from_safe.square() - from_unsafe.square()).flatten(1).mean(1)
    return (beta * (further + margin)).clamp(min=0).mean()


@dataclass(frozen=True)
class Steer(Learned):
    """On ``trajectories`` of the concept's prompts, drawn with ``guidance``, in the ``early`` share of their ``path``
    steps, what the network says with that prompt and with none is turned from the concept towards its goal in the same
    template: past the plane between the two predictions, each pushed ``push`` times further from that with no prompt,
    by ``margin``; ``beta`` weighs this. All of these are the original model's, without earlier edits. (A large push, as
    the published 15, leaves the plane's place to how far the two lie from the third. The published share of the steps,
    0.52, is that of latents of 64 x 64; the shape of small latents is settled later.)

    ``preserve`` weighs what holds unprompted trajectories, and ``keep`` those of kept prompts, to what the model as
    given says. ``reference`` repeats faults of the published code: gradients that are never set to zero, latents
    after the step with the timestep before it, and trajectories in the order of their prompts.
    """

    steps: int = 150
    lr: float = 3e-4
    batch: int = 4
    push: float = 3.0
    margin: float = 0.01
    beta: float = 1.0
    early: float = 0.75
    guidance: float = 3.0
    trajectories: int = 32
    path: int = 20
    preserve: float = 5.0
    keep: float = 30.0
    reference: bool = False

    name: ClassVar[str] = "trce.steer"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "stage 2 of TRCE: the first denoising steps are trained away from the concept"
    when: ClassVar[str] = "after trce.remap or another pass on cross-attention, for what is implied and never named"
    limits: ClassVar[str] = "alone it leaves part of what is named; a picture given half denoised is not steered"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trajectories", "path"):
            if getattr(self, name) < 1:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 1 or more")
        for name in ("push", "margin", "preserve", "keep"):
            if getattr(self, name) < 0:
                raise ErasecError(f"{self.name}: option {name} is {getattr(self, name)}", why="it takes 0 or more")
        if self.beta <= 0:
            raise ErasecError(f"{self.name}: option beta is {self.beta}", why="it takes a number above 0")
        if not 0 < self.early <= 1:
            raise ErasecError(f"{self.name}: option early is {self.early}", why="it takes a share of the steps, 0 to 1")

    def sites(self, model: Model) -> tuple[Site, ...]:
        def wanted(site: Site) -> bool:
            return site.attn == "self" or (site.attn, site.proj) == ("cross", "q")

        return learned.trainable(model, wanted, self.rank)

    def part(self) -> slice:
        """The steps of a path that are steered."""
        return slice(0, max(1, round(self.early * self.path)))

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        # The original network is let go before the model as given is loaded: there are never two.
        shown, safe, unsafe = self._targets(Denoiser(model.original, context), concept, context.seed)
        denoiser = Denoiser(model, context)
        texts = learned.texts(concept, concept.keep)
        holds: dict[str, tuple[float, Callable[[Generator], Tensor]]] = {}
        for name, weight, prompts, guidance in (
            ("preserve", self.preserve, [""], 1.0),
            ("keep", self.keep, texts, self.guidance),
        ):
            if weight and prompts:
                seed = context.seed + 1 + len(holds)
                held = self._walked(denoiser, learned.spread(prompts, self.trajectories, seed), seed, guidance)
                holds[f"loss {name}"] = weight, learned.kept(denoiser, held, self.batch, noise=True)
        student = Student(learned.modules(denoiser), self.sites(model), self.rank, context.seed)
        device = denoiser.device

        def loss(chance: Generator, step: int) -> Losses:
            index = self._drawn(shown, chance, step)
            times = shown.times[index].to(device)
            both = shown.latents[index].to(device).repeat(2, 1, 1, 1), times.repeat(2)
            said = denoiser.predict(*both, denoiser.states(shown.texts(index) + [""] * len(index)))
            good, bad = (
                denoiser.as_noise(said - wanted[index].to(device).repeat(2, 1, 1, 1), both[1])
                for wanted in (safe, unsafe)
            )
            erase = hinge(good, bad, self.beta, self.margin)
            return {"loss erase": erase} | {name: weight * held(chance) for name, (weight, held) in holds.items()}

        turn = Turn(student.trained, self.lr, loss, accumulate=self.reference, numbered=True)
        return self.edit(student, self.fit([turn], student, model, concept, context), model, concept)

    def _targets(self, original: Denoiser, concept: Concept, seed: int) -> tuple[Bank, Tensor, Tensor]:
        """The concept's trajectories, and what the original says on them guided to the goal and to the concept."""
        phrases = [phrase for phrase in concept.phrases if concept.goal(phrase) != phrase]
        wanted = [prompt.text for prompt in goals(concept, phrases)]
        goal = dict(zip(learned.texts(concept, phrases), wanted, strict=True))
        if not goal:
            raise ErasecError(
                f"{self.name}: the concept {concept.name} becomes itself", why="the goal of each phrase is that phrase",
                fix="give the concept another anchor, or none: its prompts then become the empty one",
            )  # fmt: skip
        prompts = learned.spread(list(goal), self.trajectories, seed)
        if self.reference:
            prompts = sorted(prompts, key=list(goal).index)
        shown = self._walked(original, prompts, seed, self.guidance, self.part())
        said = learned.said(original, replace(shown, prompts=tuple(goal[prompt] for prompt in prompts)))
        safe, unsafe = (to + self.push * (to - shown.free) for to in (said, shown.said))
        return shown, safe, unsafe

    def _walked(
        self, denoiser: Denoiser, prompts: list[str], seed: int, guidance: float, part: slice = slice(None)
    ) -> Bank:
        if not self.reference:
            return learned.bank(denoiser, prompts, seed, self.path, guidance, part)
        until = max(0, part.stop or 0)
        paths = denoiser.sample(prompts, learned.seeds(seed, len(prompts)), self.path, guidance, until=until)
        after = torch.cat([paths.latents[:, 1:], paths.final[:, None]], 1)
        return learned.asked(denoiser, prompts, replace(paths, latents=after), part)

    def _drawn(self, shown: Bank, chance: Generator, step: int) -> Tensor:
        if not self.reference:
            return shown.draw(self.batch, chance)
        count = len(shown.prompts)
        each = len(shown.latents) // count
        rows = torch.arange(step * self.batch, (step + 1) * self.batch) % count
        return rows * each + torch.randint(each, (self.batch,), generator=chance)


@dataclass(frozen=True)
class Trce(Steer):
    """``trce.remap``, then ``trce.steer`` on its result, as one edit. The options are those of ``trce.steer``; those of
    ``trce.remap`` that differ from its defaults are ``remap_scale``, ``remap_keep`` and ``remap_ridge``, with ``prior``
    and ``prior_weight``."""

    remap_scale: float = 1.0
    remap_keep: float = 1.0
    remap_ridge: float = 1e-3
    prior: str = ""
    prior_weight: float = 1.0

    name: ClassVar[str] = "trce"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2503.07389"
    summary: ClassVar[str] = "both stages of TRCE: closed-form remap of the end token, then early denoising trained"
    when: ClassVar[str] = "explicit content and other policies: many phrases, and prompts that only imply them"
    limits: ClassVar[str] = "what is drawn from a picture that is given half denoised is not steered"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._remap()

    def _remap(self) -> Remap:
        return Remap(
            scale=self.remap_scale, keep=self.remap_keep, ridge=self.remap_ridge, prior=self.prior,
            prior_weight=self.prior_weight,
        )  # fmt: skip

    def _steer(self) -> Steer:
        return Steer(**{field.name: getattr(self, field.name) for field in fields(Steer)})

    def sites(self, model: Model) -> tuple[Site, ...]:
        return (*self._remap().sites(model), *super().sites(model))

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        first = self._remap().solve(model, concept, context)
        second = self._steer().solve(model.with_edit(first), concept, context)
        deltas = {**first.deltas, **second.deltas}
        stats = {f"remap {key}": value for key, value in first.stats.items()} | dict(second.stats)
        return replace(second, deltas=deltas, by=self.name, params=asdict(self), stats=stats)
