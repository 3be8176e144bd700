"""SafeGen: erasing what is seen, whatever was asked, by retraining self-attention on images with a mosaic.

Li et al.: "SafeGen: Mitigating Sexually Explicit Content Generation in Text-to-Image Models", CCS 2024,
arXiv:2404.06666. The text is empty throughout, so that no wording can be one that the edit was not made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from erasec.errors import ErasecError, nearest
from erasec.training import base as learned
from erasec.training import triplets
from erasec.training.base import Learned
from erasec.training.denoiser import Denoiser, Student
from erasec.training.loop import Turn

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.loop import Losses

TARGETS = ("clipped", "constant", "exact")
BATCH = 4  # images that go through the VAE at once


def pull(alphas: Tensor, target: str, most: float) -> Tensor:
    """How much of the difference of latents the noise to predict gains, a, for cumulative products of alpha.

    What makes the network see the censored image is a = sqrt(alpha / (1 - alpha)): "exact". As "clipped" it grows to
    ``most`` and no further; "constant" is the 1 of the published code at every timestep.
    """
    if target == "constant":
        return torch.ones_like(alphas)
    exact = (alphas / (1 - alphas)).sqrt()
    return exact.clamp(max=most) if target == "clipped" else exact


def goal(denoiser: Denoiser, shown: Tensor, hidden: Tensor, noise: Tensor, times: Tensor, a: Tensor) -> Tensor:
    """What the network is to say (n, c, h, w) of ``shown`` with ``noise`` at ``times`` (n,), to mean ``hidden``: the
    noise and a (n,) times their difference, or the v of that noise and ``hidden``."""
    return denoiser.target(hidden, noise + a.view(-1, 1, 1, 1) * (shown - hidden), times)


@dataclass(frozen=True)
class SafeGen(Learned):
    """Wherever the concept shows, the network learns to predict the image in which it lies under a mosaic.

    ``triplets`` is a folder of images (see ``erasec.triplets.read``). Without one, ``images`` of the concept and as
    many of what is kept are made by the model, with ``path`` sampling steps and ``guidance``; a judge says where the
    concept is, and a mosaic of ``blocks`` by ``blocks`` cells goes there.

    ``target`` and ``most`` say how far the prediction is pulled at which noise (see ``pull``). ``erase`` and ``keep``
    weigh the losses of concept and benign images; on the latter the network is held to what it said. ``ema`` above 0
    is the decay of the moving average that is kept in the end.
    """

    steps: int = 300
    lr: float = 5e-4
    batch: int = 4
    triplets: str = ""
    images: int = 32
    path: int = 12
    guidance: float = 4.0
    blocks: int = 2
    target: str = "clipped"
    most: float = 6.0
    erase: float = 1.0
    keep: float = 3.0
    ema: float = 0.0

    name: ClassVar[str] = "safegen"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2404.06666"
    summary: ClassVar[str] = "self-attention retrained to see a mosaic where the concept is, whatever the text"
    when: ClassVar[str] = "for what can be seen and asked for in any words; after a pass for the words that are known"
    limits: ClassVar[str] = (
        "under guidance the text still pulls toward the concept: alone it blurs more than it removes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in TARGETS:
            raise ErasecError(f"safegen: option target is {self.target!r}", why=nearest(self.target, TARGETS))
        for name in ("images", "path", "blocks"):
            if getattr(self, name) < 1:
                raise ErasecError(f"safegen: option {name} is {getattr(self, name)}", why="it takes 1 or more")
        for name in ("erase", "keep"):
            if getattr(self, name) < 0:
                raise ErasecError(f"safegen: option {name} is {getattr(self, name)}", why="it takes 0 or more")
        if not self.most > 0:
            raise ErasecError(f"safegen: option most is {self.most}", why="it takes a number above 0")
        if not 0 <= self.ema < 1:
            raise ErasecError(f"safegen: option ema is {self.ema}", why="it takes 0 or more, and less than 1")

    def sites(self, model: Model) -> tuple[Site, ...]:
        return learned.trainable(model, lambda site: site.attn == "self", self.rank)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        denoiser = Denoiser(model, context)
        found = (
            triplets.read(Path(self.triplets).expanduser(), denoiser.size)
            if self.triplets
            else triplets.made(denoiser, concept, self.images, self.path, self.guidance, self.blocks)
        )
        shown, hidden, benign = (denoiser.encode(part, BATCH) for part in (found.concept, found.censored, found.benign))
        student = Student(learned.modules(denoiser), self.sites(model), self.rank, context.seed)
        text = denoiser.states([""]).expand(self.batch, -1, -1)
        strength = pull(denoiser.alphas, self.target, self.most)

        def drawn(count: int, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
            """Which images, and with what noise at which timesteps."""
            index = torch.randint(count, (self.batch,), generator=chance)
            times = torch.randint(denoiser.steps, (self.batch,), generator=chance)
            noise = torch.randn(self.batch, *denoiser.shape, generator=chance)
            return index.to(denoiser.device), times.to(denoiser.device), noise.to(denoiser.device)

        def loss(chance: Generator) -> Losses:
            index, times, noise = drawn(len(shown), chance)
            said = denoiser.predict(denoiser.noised(shown[index], noise, times), times, text)
            wanted = goal(denoiser, shown[index], hidden[index], noise, times, strength[times])
            told = {"loss erase": self.erase * (said - wanted).square().mean()}
            if not self.keep:
                return told
            index, times, noise = drawn(len(benign), chance)
            latents = denoiser.noised(benign[index], noise, times)
            with student.teacher():
                before = denoiser.predict(latents, times, text)
            said = denoiser.predict(latents, times, text)
            return told | {"loss keep": self.keep * (said - before).square().mean()}

        turn = Turn(student.trained, self.lr, loss, clip=1.0)
        run = self.fit([turn], student, model, concept, context, ema=self.ema)
        return self.edit(student, run, model, concept)
