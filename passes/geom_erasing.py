"""Geom-Erasing: a concept that images show unprompted gets tokens for its places, and a negative prompt of these.

Liu, Chen, Zhang, Han, Hong, Xu, Li, Yeung, Kwok: "Implicit Concept Removal of Diffusion Models", ECCV 2024,
arXiv:2310.05873. New tokens, one for each cell of a grid, learn where images show the concept. The edit carries the
tokens, and a negative prompt with the concept's name and all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Work
from erasec.checkpoint.staging import file_name
from erasec.errors import ErasecError
from erasec.model.edit import Edit
from erasec.options import options
from erasec.training.base import Learned, Need, networks, sampling, trainable

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.boxes import AnnotatedImages
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses
    from erasec.training.student import Student
    from erasec.training.vocabulary import Vocabulary

SLACK = 0.2  # of a cell, by which a detector's box may be too wide before it names the next cell as well
WITHOUT_CAPTION = 0.5  # fraction of rows with the concept that lose their caption; half of these get all tokens
EMPTY = 0.1  # fraction of rows without the concept's tokens that get the empty prompt


def loss_weights(inside: Tensor, alpha: float) -> Tensor:
    """Weights (..., h, w) of a loss with mean 1, ``alpha`` times as large where ``inside`` (..., h, w) is False."""

    import torch

    total = inside.shape[-1] * inside.shape[-2]
    count = inside.sum((-2, -1), keepdim=True)
    return torch.where(inside, 1.0, alpha) * total / (count + alpha * (total - count))


@options
class GeomErasing(Learned):
    """Training of new tokens for the places of a concept, on images annotated with its boxes.

    ``train`` selects what is trained: "tokens" the rows of the new tokens alone, "tokens+x" cross-attention as well.
    Images come from the folder ``boxes``, which has a table boxes.csv (see
    ``erasec.training.boxes.read_annotated_images``). Where it is empty, the model samples ``images`` images in
    ``sample_steps`` steps with ``guidance``, and a judge locates the concept. There is a token for each cell of a grid
    of ``bins`` by ``bins`` cells. ``alpha`` is the weight of the loss outside the concept relative to that inside.

    Two losses apply only where cross-attention is trained. ``clean`` is the weight of the loss on images without the
    concept with their plain captions, which thereby stand for images without it. ``keep`` is the weight of a loss that
    the paper does not have: it keeps the predictions for all images.

    With ``train`` "tokens" it is what the paper calls model removal, which cleans a pretrained model. The paper's bins,
    alpha, learning rate, steps and batch are not known: these defaults are ours.
    """

    steps: Annotated[int, Field(ge=1)] = 3000
    lr: Annotated[float, Field(gt=0)] = 5e-4
    batch: Annotated[int, Field(ge=1)] = 4
    train: Literal["tokens", "tokens+x"] = "tokens"
    bins: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 0.3
    boxes: str = ""
    images: Annotated[int, Field(ge=1)] = 400
    sample_steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    clean: Annotated[float, Field(ge=0)] = 1.0
    keep: Annotated[float, Field(ge=0)] = 0.0

    needs: ClassVar[tuple[Need, ...]] = ("one text encoder",)
    name: ClassVar[str] = "geom_erasing"
    renamed: ClassVar[dict[str, str]] = {"path": "sample_steps"}
    paper: ClassVar[str] = "arXiv:2310.05873"
    summary: ClassVar[str] = "new tokens for a concept that images show unprompted, and a negative prompt of them"
    when: ClassVar[str] = "for concepts that images show unprompted, such as a watermark, and that no word controls"
    limits: ClassVar[str] = (
        "fewer images show the concept, not none; the model can still draw it: without the negative prompt, or with "
        "another one, the concept is back"
    )
    extras: ClassVar[frozenset[str]] = frozenset({"tokens", "negative"})

    def sites(self, model: Model) -> tuple[Site, ...]:
        cross = trainable(model, lambda site: site.attn == "cross", self.rank, self.needs)
        return () if self.train == "tokens" else cross

    def work(self, model: Model, concept: Concept) -> Work:
        work = self.reads(model, concept, self.images)
        if self.boxes:
            work += Work(encoded=self.images)
        else:
            work += sampling(self.images, self.sample_steps, self.guidance, scored=False) + Work(decoded=self.images)
        both = self.train != "tokens"
        losses = 1 + both * (bool(self.clean) + bool(self.keep))
        rest = Work(trained_prompts=self.batch)
        rest += Work(rows=self.batch, calls=1) if both and self.keep else Work()
        return work + self.training(losses * self.batch, losses, rest)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student

        denoiser = Denoiser(model, context)
        tokens = token_names(concept, self.bins)
        negative = " ".join([concept.erase[0], *tokens])
        from erasec.training.vocabulary import Vocabulary

        vocabulary = Vocabulary(model, concept.erase[0], tokens, context.seed, denoiser.device)
        vocabulary.check_length(negative)
        images = self._images(denoiser, concept, context.seed)
        count = sum(map(bool, images.boxes))
        if not count:
            raise ErasecError(
                f"none of {len(images.boxes)} images shows {concept.name}",
                why="the tokens learn its places from images that show it",
                fix="raise images, or give boxes: a folder of images that show it, with their boxes",
            )
        sites = self.sites(model)
        student = Student(networks(denoiser), sites, self.rank, context.seed) if sites else None
        loss = self._loss(denoiser, vocabulary, images, concept, student)
        parameters = {"rows": vocabulary.table.change} | (student.parameters if student else {})
        run = self.fit([Objective(parameters, self.lr, loss)], student, model, concept, context)
        rows = vocabulary.table.rows.detach().cpu()
        stats = {**run.stats(), "pictures": float(len(images.boxes)), "marked": float(count)}
        return Edit(
            student.deltas() if student else {},
            self.name,
            (concept.name,),
            model.digest,
            asdict(self),
            stats=stats,
            tokens=dict(zip(tokens, rows.clone(), strict=True)),
            negative=negative,
            curves=run.curves,
        )

    def _loss(
        self,
        denoiser: Denoiser,
        vocabulary: Vocabulary,
        images: AnnotatedImages,
        concept: Concept,
        student: Student | None,
    ) -> Callable[[Generator], Losses]:
        import torch

        from erasec.training.boxes import covered_cells

        name, tokens = concept.erase[0], token_names(concept, self.bins)
        annotated = torch.tensor([row for row, boxes in enumerate(images.boxes) if boxes])
        clean = torch.tensor([row for row, boxes in enumerate(images.boxes) if not boxes])
        inside = torch.stack([covered_cells(boxes, *denoiser.shape[1:]) for boxes in images.boxes])
        weights = loss_weights(inside, self.alpha).to(denoiser.device)
        grids = [covered_cells(boxes, self.bins, self.bins, SLACK).flatten() for boxes in images.boxes]
        covered = [[token for token, touched in zip(tokens, grid, strict=True) if touched] for grid in grids]
        latents = images.latents.to(denoiser.device)

        def add_noise(index: Tensor, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
            """Noised latents of the images at ``index``, the noise and the timesteps."""
            timesteps = torch.randint(denoiser.steps, (len(index),), generator=rng).to(denoiser.device)
            noise = torch.randn(len(index), *denoiser.shape, generator=rng).to(denoiser.device)
            return denoiser.add_noise(latents[index], noise, timesteps), noise, timesteps

        def named_loss(rng: Generator) -> Tensor:
            """On images of the concept, with its name and tokens in the prompt."""
            index = annotated[torch.randint(len(annotated), (self.batch,), generator=rng)]
            prompts = []
            for row, draw in zip(index.tolist(), torch.rand(self.batch, generator=rng).tolist(), strict=True):
                words = " ".join([name, *(tokens if draw < WITHOUT_CAPTION / 2 else covered[row])])
                caption = "" if draw < WITHOUT_CAPTION else images.captions[row]
                prompts.append(vocabulary.append_words(caption, words))
            noised, noise, timesteps = add_noise(index, rng)
            prediction = denoiser.predict(noised, timesteps, vocabulary.states(prompts))
            errors = (prediction - denoiser.target(latents[index], noise, timesteps)).square()
            return (weights[index][:, None] * errors).mean()

        def caption_states(index: Tensor, rng: Generator) -> Tensor:
            """Text states of the images' captions, some of them replaced by the empty prompt."""
            draws = torch.rand(self.batch, generator=rng).tolist()
            rows = zip(index.tolist(), draws, strict=True)
            return denoiser.states(["" if draw < EMPTY else images.captions[row] for row, draw in rows])

        def clean_loss(rng: Generator) -> Tensor:
            """On images without the concept, with their captions."""
            index = clean[torch.randint(len(clean), (self.batch,), generator=rng)]
            states = caption_states(index, rng)
            noised, noise, timesteps = add_noise(index, rng)
            prediction = denoiser.predict(noised, timesteps, states)
            return (prediction - denoiser.target(latents[index], noise, timesteps)).square().mean()

        def keep_loss(student: Student, rng: Generator) -> Tensor:
            """On all images, with their captions: the difference from the teacher's predictions."""
            index = torch.randint(len(latents), (self.batch,), generator=rng)
            states = caption_states(index, rng)
            noised, _, timesteps = add_noise(index, rng)
            with student.teacher():
                target = denoiser.predict(noised, timesteps, states)
            return (denoiser.predict(noised, timesteps, states) - target).square().mean()

        def loss(rng: Generator) -> Losses:
            losses = {"loss named": named_loss(rng)}
            if student and self.clean and len(clean):
                losses["loss clean"] = self.clean * clean_loss(rng)
            if student and self.keep:
                losses["loss keep"] = self.keep * keep_loss(student, rng)
            return losses

        return loss

    def _images(self, denoiser: Denoiser, concept: Concept, seed: int) -> AnnotatedImages:
        from erasec.training.boxes import generate_annotated_images, read_annotated_images

        if self.boxes:
            return read_annotated_images(Path(self.boxes).expanduser(), denoiser)
        return generate_annotated_images(denoiser, concept, self.images, self.sample_steps, self.guidance, seed)


def token_names(concept: Concept, bins: int) -> tuple[str, ...]:
    """A token for each cell of a grid of ``bins`` by ``bins`` cells, row by row: <CONCEPT-COLUMN,ROW>."""
    slug = file_name((concept.name.lower(),)) or "concept"
    return tuple(f"<{slug}-{column},{row}>" for row, column in product(range(bins), repeat=2))
