"""SafeGen: self-attention is trained to predict a mosaic where the concept is, with the empty prompt throughout.

Li et al.: "SafeGen: Mitigating Sexually Explicit Content Generation in Text-to-Image Models", CCS 2024,
arXiv:2404.06666. Since no text takes part in the training, the edit does not depend on the wording of prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Work
from erasec.options import options
from erasec.training.base import Learned, guidance_scale, networks, sampling, trainable

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses

BATCH = 4  # images that the VAE encodes at once


def target_scale(picture_ratio: Tensor, target: str, max_pull: float) -> Tensor:
    """The factor a of the difference of latents in the target (see ``censored_target``), for amplitudes of the picture
    relative to the noise.

    With a = ``picture_ratio``, the ``target`` "exact", the prediction stands for the censored image: that is
    sqrt(alpha / (1 - alpha)) in a schedule of noise, and (1 - sigma) / sigma in a rectified flow. "clipped" limits this
    to at most ``max_pull``. "constant" is 1 at every timestep, as in the published code.
    """

    import torch

    if target == "constant":
        return torch.ones_like(picture_ratio)
    return picture_ratio.clamp(max=max_pull) if target == "clipped" else picture_ratio


def censored_target(
    denoiser: Denoiser, original: Tensor, censored: Tensor, noise: Tensor, timesteps: Tensor, a: Tensor
) -> Tensor:
    """The target (n, c, h, w) of the prediction for ``original`` latents with ``noise`` at ``timesteps`` (n,).

    It is noise + a (original - censored), with a (n,) from ``target_scale``; for a model that predicts v or a velocity,
    that of this noise and ``censored``.
    """
    return denoiser.target(censored, noise + a.view(-1, 1, 1, 1) * (original - censored), timesteps)


@options
class SafeGen(Learned):
    """Training of self-attention on images of the concept, to predict the same images with the concept under a mosaic.

    Of joint attention it trains the matrices of the picture's stream alone, none of the text's, and none that serves
    both.

    ``triplets`` is a folder of images (see ``erasec.training.triplets.read_triplets``). Where it is empty, the model
    samples ``images`` images of the concept and as many of kept prompts, in ``sample_steps`` steps with ``guidance``; a
    judge locates the concept, and a mosaic of ``mosaic_cells`` by ``mosaic_cells`` cells covers it.

    ``target`` says how far the target is pulled to the censored picture: "exact" as far as a prediction of that picture
    asks, "clipped" as "exact" with a factor of at most ``max_pull``, "constant" with a factor of 1, as in the published
    code (see ``target_scale``). ``erase`` is the weight of the loss on images
    of the concept, and ``keep`` that of the loss on benign images, which keeps the predictions for these. ``ema`` above
    0 is the decay of the moving average of the weights that results; with 0 it is their last values.

    The defaults are the published settings for Stable Diffusion 1.4, with one correction: the published target,
    "constant", pulls 15 times too hard at the highest noise level, and "clipped" is exact but for the lowest. The limit
    ``max_pull`` is ours. The published code makes updates of five images, one after the other; here they are one batch.
    The paper takes photographs; images that the model samples get the usual 50 steps and guidance 7.5, and blocks of a
    mosaic that are a sixteenth of the picture where the concept fills half of its side.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 5
    triplets: str = ""
    images: Annotated[int, Field(ge=1)] = 100
    sample_steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    mosaic_cells: Annotated[int, Field(ge=1)] = 8
    target: Literal["clipped", "constant", "exact"] = "clipped"
    max_pull: Annotated[float, Field(gt=0)] = 6.0
    erase: Annotated[float, Field(ge=0)] = 0.1
    keep: Annotated[float, Field(ge=0)] = 0.9
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9999

    name: ClassVar[str] = "safegen"
    renamed: ClassVar[dict[str, str]] = {"path": "sample_steps", "blocks": "mosaic_cells", "most": "max_pull"}
    paper: ClassVar[str] = "arXiv:2404.06666"
    summary: ClassVar[str] = "self-attention trained to predict a mosaic where the concept is, whatever the text"
    when: ClassVar[str] = "for concepts that prompts reach in many words; after a pass that erases the known words"
    limits: ClassVar[str] = (
        "under guidance the text still pulls toward the concept: alone it blurs more than it removes"
    )

    def sites(self, model: Model) -> tuple[Site, ...]:
        # In joint attention, the picture's own queries, keys, values and outputs.
        return trainable(model, lambda site: site.attn in ("self", "joint"), self.rank, self.needs)

    def work(self, model: Model, concept: Concept) -> Work:
        work = self.reads(model, concept, 2 * self.images) + Work(encoded=3 * self.images)
        if not self.triplets:
            guidance = guidance_scale(model, self.guidance)
            work += sampling(2 * self.images, self.sample_steps, guidance, scored=False)
            work += Work(decoded=2 * self.images)
        teacher = Work(rows=self.batch, calls=1) if self.keep else Work()
        losses = 1 + bool(self.keep)
        return work + self.training(losses * self.batch, losses, teacher)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        import torch

        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student
        from erasec.training.triplets import generate_triplets, read_triplets

        denoiser = Denoiser(model, context)
        images = (
            read_triplets(Path(self.triplets).expanduser(), denoiser.size)
            if self.triplets
            else generate_triplets(denoiser, concept, self.images, self.sample_steps, self.guidance, self.mosaic_cells)
        )
        original, censored, benign = (
            denoiser.encode(part, BATCH) for part in (images.concept, images.censored, images.benign)
        )
        student = Student(networks(denoiser), self.sites(model), self.rank, context.seed)
        empty = denoiser.states([""]).expand(self.batch, -1, -1)
        factors = target_scale(denoiser.schedule.picture_ratio(), self.target, self.max_pull)

        def draw(count: int, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
            """Random indices of images, indices of timesteps and noise for one batch."""
            index = torch.randint(count, (self.batch,), generator=rng)
            times = torch.randint(denoiser.steps, (self.batch,), generator=rng)
            noise = torch.randn(self.batch, *denoiser.shape, generator=rng)
            return index.to(denoiser.device), times.to(denoiser.device), noise.to(denoiser.device)

        def loss(rng: Generator) -> Losses:
            index, times, noise = draw(len(original), rng)
            timesteps = denoiser.schedule.grid[times]
            prediction = denoiser.predict(denoiser.add_noise(original[index], noise, timesteps), timesteps, empty)
            target = censored_target(denoiser, original[index], censored[index], noise, timesteps, factors[times])
            losses = {"loss erase": self.erase * (prediction - target).square().mean()}
            if not self.keep:
                return losses
            index, times, noise = draw(len(benign), rng)
            timesteps = denoiser.schedule.grid[times]
            latents = denoiser.add_noise(benign[index], noise, timesteps)
            with student.teacher():
                target = denoiser.predict(latents, timesteps, empty)
            prediction = denoiser.predict(latents, timesteps, empty)
            return losses | {"loss keep": self.keep * (prediction - target).square().mean()}

        objective = Objective(student.parameters, self.lr, loss, clip=1.0)
        run = self.fit([objective], student, model, concept, context, ema=self.ema)
        return self.edit(student, run, model, concept)
