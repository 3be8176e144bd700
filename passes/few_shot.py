"""Few-shot unlearning: the text encoder unlearns a concept from a few images of it.

Fuchi, Takagi: "Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning", BMVC 2024,
arXiv:2405.07288. It is textual inversion with the sign of the loss reversed: the denoiser's error on images of the
concept, with prompts of the concept, is raised.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Work
from erasec.errors import ErasecError
from erasec.options import options
from erasec.training.base import Learned, check_trainable, guidance_scale, sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses

SUFFIXES = (".png", ".jpg", ".jpeg")
SPAN = 0.1, 0.9  # of the noise schedule: at other timesteps the error hardly depends on the text
PANEL = 4  # images on which the rules measure the error, and timesteps for each
KEPT = 64  # kept prompts from which the preservation loss draws
DRAWN = 16  # of these, prompts drawn in each step
MONITORED = 24  # of these, prompts whose end tokens are compared


@options
class FewShot(Learned):
    """Training of the text encoders alone: of all that the denoiser reads, and of each only layers whose output it
    reads.

    ``train`` selects their tensors: "mlp" the feed-forward layers, "attn" all attention, "mlp-attn" both,
    "mlp-final-attn" the feed-forward layers and the attention of the last layer. ``images`` images of the concept come
    from ``folder`` or, where it is empty, are sampled from the model in ``sample_steps`` steps with ``guidance``.

    Three rules end the training early; 0 turns a rule off. It stops when the error on the images with prompts of the
    concept reaches ``stop_ratio`` times the error with the empty prompt before the training. It undoes the last step
    and stops when the mean cosine similarity of the end tokens of kept prompts, and of their pooled states where the
    denoiser reads these, with the original states falls below ``min_cosine``, or when the error on images of kept
    prompts rises by more than the fraction ``max_rise``. ``keep`` is the weight of a loss that the paper does not have:
    the mean squared change of the text states of kept prompts, relative to their mean square.

    The defaults are the published settings for Stable Diffusion: five epochs of two batches. The paper takes four
    photographs; images that the model samples get the usual 50 steps and guidance 7.5. The paper has no rules: it saves
    every epoch, and the user chooses. The loss has no lower bound, so that the two rules that undo a harmful step are
    on. The rule that stops needs a ratio that was only ever measured on glyphs, and is off.
    """

    steps: Annotated[int, Field(ge=1)] = 10
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 2
    train: Literal["mlp-final-attn", "mlp", "attn", "mlp-attn"] = "mlp-final-attn"
    folder: str = ""
    images: Annotated[int, Field(ge=1)] = 4
    sample_steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    keep: Annotated[float, Field(ge=0)] = 0.0
    stop_ratio: Annotated[float, Field(ge=0)] = 0.0
    min_cosine: Annotated[float, Field(ge=0, lt=1)] = 0.98
    max_rise: Annotated[float, Field(ge=0)] = 0.02

    name: ClassVar[str] = "few_shot"
    renamed: ClassVar[dict[str, str]] = {
        "path": "sample_steps",
        "ratio": "stop_ratio",
        "cosine": "min_cosine",
        "worse": "max_rise",
    }
    paper: ClassVar[str] = "arXiv:2405.07288"
    summary: ClassVar[str] = "a few steps in which the text encoder unlearns the concept's names, from a few images"
    when: ClassVar[str] = "for a named object or style, in seconds, with only the text encoder to ship"
    limits: ClassVar[str] = "with the stock text encoder the concept is back; the denoiser can still draw it"

    def sites(self, model: Model) -> tuple[Site, ...]:
        check_trainable(model, self.needs)
        sites = [site for site in model.parameters if site.component in model.family.text_encoders and site.proj]
        sites = [site for site in sites if not self.rank or len(site.shape) == 2]
        last = {name: _last_layer(model, name, sites) for name in model.family.text_encoders}

        def selects(site: Site) -> bool:
            layer = _layer(site)
            if layer > last[site.component]:
                return False
            if site.proj == "mlp":
                return "mlp" in self.train
            return layer == last[site.component] if "final" in self.train else "attn" in self.train

        return tuple(site for site in sites if selects(site))

    def work(self, model: Model, concept: Concept) -> Work:
        given = self.images if self.folder else 0
        work = self.reads(model, concept, 2 * PANEL**2 + self.images) + Work(prompts=KEPT, encoded=given)
        guidance = guidance_scale(model, self.guidance)
        work += sampling(self.images - given + PANEL, self.sample_steps, guidance, scored=False)
        rows = PANEL * (min(PANEL, self.images) + PANEL)  # of both panels, which are measured after every step
        panels = Work(prompts=rows + MONITORED, rows=rows, calls=rows / self.batch)
        encoded = Work(trained_prompts=self.batch + (DRAWN if self.keep else 0))
        return work + panels + self.training(self.batch, 1, panels + encoded)

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        import torch

        from erasec.model.text_encoders import TextEncoders
        from erasec.training import banks
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student

        denoiser = Denoiser(model, context)
        names = model.family.text_encoders
        encoders = TextEncoders(
            model.source, {name: tensors for name, tensors in model.merged().items() if name in names}
        )
        modules = {name: encoders.encoder(name).to(denoiser.device).requires_grad_(False) for name in names}
        encode = partial(denoiser.encode_prompts, encoders=encoders)
        captions = banks.concept_prompts(concept, concept.phrases)
        kept = banks.spread_prompts(["", *banks.concept_prompts(concept, concept.keep)], KEPT, context.seed)
        original = denoiser.states(kept)
        mean_square = original.square().mean()
        erased = self.latents(denoiser, captions, context.seed)
        monitor = self.monitor(denoiser, erased, captions, kept, context.seed)
        student = Student(modules, self.sites(model), self.rank, context.seed)

        def loss(rng: Generator) -> Losses:
            latents = erased[torch.randperm(len(erased), generator=rng)[torch.arange(self.batch) % len(erased)]]
            prompts = [captions[row] for row in torch.randint(len(captions), (self.batch,), generator=rng).tolist()]
            noise = torch.randn(latents.shape, generator=rng).to(latents)
            timesteps = denoiser.schedule.grid[stratified_timesteps(self.batch, denoiser.steps, rng).to(latents.device)]
            losses = {"loss erase": -prediction_errors(denoiser, latents, noise, timesteps, encode(prompts)).mean()}
            if self.keep:
                rows = torch.randint(len(kept), (DRAWN,), generator=rng)
                change = encode([kept[row] for row in rows.tolist()]) - original[rows]
                losses["loss keep"] = self.keep * change.square().mean() / mean_square
            return losses

        measure = partial(monitor.measure, encode)
        objective = Objective(student.parameters, self.lr, loss, betas=(0.9, 0.98), eps=1e-6, decay=1e-8)
        rules = {"measure": measure, "guard": self.drift_guard, "stop_rule": self.stop_rule}
        run = self.fit([objective], student, model, concept, context, **rules)
        if run.rolled_back and run.steps == 1:
            raise ErasecError(
                f"few_shot: the first step on {concept.name} already went too far",
                why=run.stopped,
                fix="lower lr or min_cosine, or raise max_rise",
            )
        if run.rolled_back:  # the last measurements are those of the step that was undone
            for curve, value in measure().items():
                run.curves[curve].append(value)
        return self.edit(student, run, model, concept)

    def latents(self, denoiser: Denoiser, captions: Sequence[str], seed: int) -> Tensor:
        """Latents (n, c, h, w) of the images of the concept, on the device."""

        from erasec.training import banks

        if self.folder:
            return denoiser.encode(read_images(Path(self.folder).expanduser(), self.images, denoiser.size))
        return self.sample_latents(denoiser, banks.spread_prompts(captions, self.images, seed), seed)

    def sample_latents(self, denoiser: Denoiser, prompts: Sequence[str], seed: int) -> Tensor:
        """Latents (n, c, h, w) that the model samples for n prompts, on the device."""

        from erasec.training import banks

        seeds = banks.training_seeds(seed, len(prompts))
        return denoiser.sample(prompts, seeds, self.sample_steps, self.guidance).final.to(denoiser.device)

    def monitor(
        self, denoiser: Denoiser, erased: Tensor, captions: Sequence[str], kept: Sequence[str], seed: int
    ) -> Monitor:
        """The measurements of the rules, on the first of the images and of the kept prompts."""

        from erasec.training import banks

        erased_prompts = banks.spread_prompts(captions, PANEL * len(erased[:PANEL]), seed)
        erased_panel = Panel(denoiser, erased[:PANEL], erased_prompts, self.batch, seed)
        kept_prompts = [prompt for prompt in kept[:PANEL] for _ in range(PANEL)]
        kept_latents = self.sample_latents(denoiser, kept[:PANEL], seed + 1)
        kept_panel = Panel(denoiser, kept_latents, kept_prompts, self.batch, seed + 1)
        return Monitor(denoiser, erased_panel, kept_panel, kept[:MONITORED])

    def drift_guard(self, curves: Mapping[str, Sequence[float]]) -> str:
        """Why the last step must be undone, by ``min_cosine`` and ``max_rise``; "" where it need not be."""
        cosine, rise = curves["cosine"][-1], curves["worse"][-1]
        if self.min_cosine and cosine < self.min_cosine:
            return f"end tokens of kept prompts fell to a cosine of {cosine:.3f} with their original states"
        if self.max_rise and rise > self.max_rise:
            return f"the error on images of kept prompts rose by {rise:.1%}"
        return ""

    def stop_rule(self, curves: Mapping[str, Sequence[float]]) -> str:
        """Why the training can end, by ``stop_ratio``; "" to continue."""
        ratio = curves["ratio"][-1]
        if self.stop_ratio and ratio >= self.stop_ratio:
            return f"the error reached {ratio:.2f} times that of the empty prompt"
        return ""


class Panel:
    """Latents (n, c, h, w) with fixed noise at ``PANEL`` fixed timesteps each, and a prompt for each of these rows."""

    def __init__(self, denoiser: Denoiser, latents: Tensor, prompts: Sequence[str], batch: int, seed: int) -> None:
        import torch

        self.denoiser, self.prompts, self.batch = denoiser, prompts, batch
        self.latents = latents.repeat_interleave(PANEL, 0)
        self.noise = denoiser.draw([seed * 1_000_003 + 500_000 + row for row in range(len(prompts))])
        times = (torch.linspace(*SPAN, PANEL) * denoiser.steps).long().repeat(len(latents))
        self.timesteps = denoiser.schedule.grid[times.to(latents.device)]

    def error(self, states: Tensor) -> float:
        """The mean squared error of the denoiser with text states (rows, t, d)."""

        import torch

        rows = self.latents, self.noise, self.timesteps, states
        batches = zip(*(values.split(self.batch) for values in rows), strict=True)
        with torch.no_grad():
            return float(torch.cat([prediction_errors(self.denoiser, *batch) for batch in batches]).mean())


class Monitor:
    """Measures the erasure and the drift after each step.

    "ratio" is the error on images of the concept with its prompts, relative to that with the empty prompt before the
    training. "cosine" is the mean cosine similarity of the end-token states of kept prompts with the original ones, in
    every part of the text states, and of their pooled states. Prompts whose states are always zeros are left out of it.
    "worse" is the relative rise of the error on images of kept prompts.
    """

    def __init__(self, denoiser: Denoiser, erased: Panel, kept: Panel, kept_prompts: Sequence[str]) -> None:
        import torch

        self.erased, self.kept = erased, kept
        self.kept_prompts = [prompt for prompt in kept_prompts if bool(denoiser.states([prompt]).any())]
        self.ends = end_rows(denoiser, self.kept_prompts)
        self.original = denoiser.states(self.kept_prompts)[self.ends] if self.kept_prompts else torch.empty(0)
        self.empty_error = erased.error(denoiser.states([""] * len(erased.prompts)))
        self.kept_error = kept.error(denoiser.states(kept.prompts))

    def measure(self, encode: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
        """The measurements by name, with text states (n, t, d) of n prompts as ``encode`` gives them."""

        import torch

        with torch.no_grad():
            cosine = 1.0
            if self.kept_prompts:
                states = encode(self.kept_prompts)[self.ends]
                cosine = float(torch.nn.functional.cosine_similarity(states, self.original).mean())
            return {
                "ratio": self.erased.error(encode(self.erased.prompts)) / self.empty_error,
                "cosine": cosine,
                "worse": self.kept.error(encode(self.kept.prompts)) / self.kept_error - 1,
            }


def end_rows(denoiser: Denoiser, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The places in text states (n, t, d) of the end token of each of n prompts, in every part of the states, and of
    its pooled state where there is one: indices of prompts and of rows."""

    import torch

    model, count = denoiser.model, len(prompts)
    parts = model.family.streams[0].parts
    lengths = [part.shape[1] for part in model.encode([""]).parts]
    rows = [
        model.last_tokens(prompts, part=number) + 1 + sum(lengths[:number])
        for number in range(len(parts) if count else 0)
    ]
    if count and model.family.pooled:
        rows.append(torch.full((count,), denoiser.states([""]).shape[1] - 1))
    places = torch.arange(count).repeat(len(rows)), torch.cat([torch.empty(0, dtype=torch.long), *rows])
    return places[0].to(denoiser.device), places[1].to(denoiser.device)


def prediction_errors(denoiser: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """The mean squared error of the prediction for each latent with ``noise`` added, (n,).

    The target is the noise or, for a model that predicts it, v or the velocity.
    """
    prediction = denoiser.predict(denoiser.add_noise(latents, noise, timesteps), timesteps, states)
    return (prediction - denoiser.target(latents, noise, timesteps)).square().flatten(1).mean(1)


def stratified_timesteps(count: int, steps: int, rng: Generator) -> Tensor:
    """Random timesteps (count,), one in each of ``count`` equal parts of the ``SPAN`` of a schedule of ``steps``."""

    import torch

    fractions = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return ((SPAN[0] + (SPAN[1] - SPAN[0]) * fractions) * steps).long()


def read_images(folder: Path, count: int, size: int) -> Tensor:
    """The first ``count`` images of a folder by name, (n, 3, size, size) in [-1, 1]: their centre squares, scaled.

    Raises ErasecError where there is none, or one cannot be read or is smaller than half of ``size``.
    """

    import torch

    from erasec.training.images import read_image, to_square_tensor

    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        why = "it holds no .png, .jpg or .jpeg" if folder.is_dir() else "there is no such folder"
        raise ErasecError(
            f"few_shot: no images in {folder}", why=why, fix="leave folder out to use images of the model"
        )
    squares = []
    for path in paths:
        image = read_image(path)
        if 2 * min(image.size) < size:
            raise ErasecError(
                f"few_shot: {path.name} is {image.width} x {image.height}",
                where=str(folder),
                why=f"the model generates images of {size} x {size}; a given image must have at least half that size",
            )
        squares.append(to_square_tensor(image, size))
    return torch.stack(squares)


def _layer(site: Site) -> int:
    """The number of a text encoder's layer, from the tensor's name; -1 for tensors outside the layers."""
    match = re.search(r"(?:layers|block)\.(\d+)\.", site.key)
    return int(match[1]) if match else -1


def _last_layer(model: Model, encoder: str, sites: Sequence[Site]) -> int:
    """The last layer of a text encoder whose output the denoiser reads: the one before the last where it reads
    penultimate states alone."""
    parts = [part for stream in model.family.streams for part in stream.parts if encoder in part.encoders]
    last = max((_layer(site) for site in sites if site.component == encoder), default=0)
    return last - all(part.state == "penultimate" for part in parts)
