"""ESD: erased stable diffusion, by negative guidance.

Gandikota, Materzynska, Fiotto-Kaufman, Bau: "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv:2303.07345.
With a prompt of the concept, the network learns to predict what it predicted without one, guided away from the concept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Work
from erasec.errors import ErasecError
from erasec.options import options
from erasec.training.base import HEADS, Learned, guidance_scale, networks, reads_text, sampling, trainable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.banks import Bank
    from erasec.training.loop import Losses


@options
class Esd(Learned):
    """Training with the target of Eq. 8 of the paper, on trajectories of the concept's prompts.

    ``train`` selects the tensors: "x" is cross-attention, for concepts that prompts name; "u" is everything else, for
    concepts that images show unprompted; "noxattn" is "u" without the output head and the time embedding; "full" is
    everything. ``negative_guidance`` is how far the target is led away from the concept, eta of Eq. 8. ``toward``
    "nothing" leads from the unconditional prediction, as in the paper. "anchor" leads from the prediction for the
    anchor, so that the rest of a prompt keeps its effect (see ``banks.esd_target``). ``trajectories`` is the number of
    trajectories, sampled once from the model before the training, in ``sample_steps`` steps with ``guidance``; of each,
    the steps whose timestep is at least the fraction ``min_noise`` of all are trained on (sigma, of a rectified flow).
    ``keep`` is the weight of a loss that the paper does not have: it keeps the predictions for kept prompts.

    Where guidance is distilled there is no unconditional prediction, and ``toward`` is "anchor". A network that reads
    the scale of its guidance is trained at 1 and at ``guidance``, and every target is at the scale of its prediction.

    The defaults are the published settings for Stable Diffusion 1.4. Two differ by necessity. The paper samples new
    latents in each step, from the network as it is at that step; ``trajectories`` is our number of those that are
    sampled once instead. ``keep`` is 0 because a weight of it for Stable Diffusion was never measured.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 1
    train: Literal["x", "u", "noxattn", "full"] = "x"
    negative_guidance: float = 1.0
    toward: Literal["anchor", "nothing"] = "nothing"
    guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectories: Annotated[int, Field(ge=1)] = 64
    sample_steps: Annotated[int, Field(ge=1)] = 50
    min_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keep: Annotated[float, Field(ge=0)] = 0.0

    name: ClassVar[str] = "esd"
    renamed: ClassVar[dict[str, str]] = {"path": "sample_steps", "negative": "negative_guidance"}
    paper: ClassVar[str] = "arXiv:2303.07345"
    summary: ClassVar[str] = "training by negative guidance; cross-attention, or everything else"
    when: ClassVar[str] = (
        "a style or an object that closed-form passes leave in implicit prompts; train=u where images must change "
        "whatever the prompt"
    )
    limits: ClassVar[str] = (
        "It is trained on prompts that name the concept: other prompts may still draw it, and new training brings it "
        "back."
    )

    def sites(self, model: Model) -> tuple[Site, ...]:
        def selects(site: Site) -> bool:
            cross = reads_text(site)
            if self.train == "noxattn":
                return not cross and not site.key.startswith(HEADS)
            return self.train == "full" or cross == (self.train == "x")

        sites = trainable(model, selects, self.rank, self.needs)
        if model.family.distilled and self.toward == "nothing":
            raise ErasecError(
                f"esd:toward=nothing does not fit a model of the family {model.family.name}",
                why="its guidance is distilled: the prediction for the empty prompt is not the unconditional one",
                fix="leave out toward, or write toward=anchor: the target is then the prediction for the anchor, led "
                "away from the concept",
            )
        return sites

    def work(self, model: Model, concept: Concept) -> Work:
        bank = sampling(self.trajectories, self.sample_steps, guidance_scale(model, self.guidance))
        goals = Work(rows=self.trajectories * self.sample_steps * (self.toward == "anchor"))
        losses = 1 + bool(self.keep)
        banks = bank + bank if self.keep else bank
        training = self.training(losses * self.batch, losses)
        return self.reads(model, concept, 3 * self.trajectories) + banks + goals + training

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        from erasec.training import banks
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student

        denoiser = Denoiser(model, context)

        def bank(prompts: Sequence[str], seed: int) -> Bank:
            spread = banks.spread_prompts(prompts, self.trajectories, seed)
            part = denoiser.noisy_steps(self.sample_steps, self.min_noise)
            return banks.sample_bank(denoiser, spread, seed, self.sample_steps, self.guidance, part)

        sites = self.sites(model)
        erased = bank(banks.concept_prompts(concept, concept.phrases), context.seed)
        kept = bank(["", *banks.concept_prompts(concept, concept.keep)], context.seed + 1) if self.keep else None
        keep_loss = banks.preservation_loss(denoiser, kept, self.batch) if kept else None
        target = banks.esd_target(denoiser, concept, erased, self.negative_guidance, self.toward)
        student = Student(networks(denoiser), sites, self.rank, context.seed)

        def loss(rng: Generator) -> Losses:
            index = erased.draw(self.batch, rng)
            prediction = banks.predict_rows(denoiser, erased, index)
            losses = {"loss erase": (prediction - target[index].to(denoiser.device)).square().mean()}
            return losses | ({"loss keep": self.keep * keep_loss(rng)} if keep_loss else {})

        run = self.fit([Objective(student.parameters, self.lr, loss)], student, model, concept, context)
        return self.edit(student, run, model, concept)
