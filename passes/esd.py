"""ESD: erased stable diffusion, by guidance away from the concept.

Gandikota, Materzynska, Fiotto-Kaufman, Bau: "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv:2303.07345.
With the concept's prompt the network learns to say what it said without one, and more of the same away from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from erasec.errors import ErasecError, nearest
from erasec.training import base as learned
from erasec.training.base import Learned
from erasec.training.denoiser import Denoiser, Student
from erasec.training.loop import Turn

if TYPE_CHECKING:
    from torch import Generator

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.loop import Losses

PARTS = ("x", "u", "noxattn", "full")


@dataclass(frozen=True)
class Esd(Learned):
    """``train`` says what is trained: "x" cross-attention, for concepts that are named; "u" all else, for those that
    show without being named; "noxattn" as "u" without the output head and the time embedding; "full" everything.

    ``negative`` is eta of Eq. 8, ``toward`` "nothing" as there, or "anchor" (see ``learned.away``). ``guidance`` is
    that of the ``trajectories`` of ``path`` steps on which it trains; they are sampled once, from the model as it was.
    ``keep`` weighs a loss that the paper does not have: on kept prompts the network is held to what it said.
    """

    steps: int = 300
    lr: float = 2e-4
    batch: int = 4
    train: str = "x"
    negative: float = 1.0
    toward: str = "anchor"
    guidance: float = 3.0
    trajectories: int = 32
    path: int = 20
    keep: float = 3.0

    name: ClassVar[str] = "esd"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2303.07345"
    summary: ClassVar[str] = "training by guidance away from the concept; cross-attention, or all but that"
    when: ClassVar[str] = (
        "a style or an object that closed-form passes leave in implicit prompts; train=u where the picture must "
        "change whatever the prompt"
    )
    limits: ClassVar[str] = (
        "It is trained on prompts that name the concept: a prompt that reaches it by another way may still do so, and "
        "new training brings it back."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in PARTS:
            raise ErasecError(f"esd: option train is {self.train!r}", why=nearest(self.train, PARTS))
        if self.toward not in learned.TOWARD:
            raise ErasecError(f"esd: option toward is {self.toward!r}", why=nearest(self.toward, learned.TOWARD))

    def sites(self, model: Model) -> tuple[Site, ...]:
        def wanted(site: Site) -> bool:
            cross = ".attn2." in site.key
            if self.train == "noxattn":
                return not cross and not site.key.startswith(learned.HEADS)
            return self.train == "full" or cross == (self.train == "x")

        return learned.trainable(model, wanted, self.rank)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        denoiser = Denoiser(model, context)
        erase = learned.spread(learned.texts(concept, concept.phrases), self.trajectories, context.seed)
        shown = learned.bank(denoiser, erase, context.seed, self.path, self.guidance)
        hold = learned.spread(["", *learned.texts(concept, concept.keep)], self.trajectories, context.seed + 1)
        held = learned.bank(denoiser, hold, context.seed + 1, self.path, self.guidance) if self.keep else None
        still = learned.kept(denoiser, held, self.batch) if held else None
        goal = learned.away(denoiser, concept, shown, self.negative, self.toward)
        student = Student(learned.modules(denoiser), self.sites(model), self.rank, context.seed)
        device = denoiser.device

        def loss(chance: Generator) -> Losses:
            index = shown.draw(self.batch, chance)
            latents, times = shown.latents[index].to(device), shown.times[index].to(device)
            said = denoiser.predict(latents, times, denoiser.states(shown.texts(index)))
            found = {"loss erase": (said - goal[index].to(device)).square().mean()}
            return found | ({"loss keep": self.keep * still(chance)} if still else {})

        run = self.fit([Turn(student.trained, self.lr, loss)], student, model, concept, context)
        return self.edit(student, run, model, concept)
