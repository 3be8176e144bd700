"""Few-shot erasing: the text encoder unlearns a concept from a few of its pictures.

Fuchi, Takagi: "Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning", BMVC 2024,
arXiv:2405.07288. Textual inversion with its sign turned: the error of the denoiser on the concept's pictures is raised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from erasec.errors import ErasecError, nearest
from erasec.model.text_encoders import Texts, load_encoder
from erasec.training import base as learned
from erasec.training.base import Learned
from erasec.training.denoiser import Denoiser, Student, trained
from erasec.training.loop import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.loop import Losses

PARTS = ("mlp-final-attn", "mlp", "attn", "mlp-attn")
PICTURES = (".png", ".jpg", ".jpeg")
SPAN = 0.1, 0.9  # of the schedule: outside, the error hardly depends on the text, and is either all or nothing
PANEL = 4  # pictures and, of each, timesteps at which the rules are measured
HELD = 64  # kept prompts that the preserving loss draws from
DRAWN = 16  # of these, in each step
WATCHED = 24  # of these, how many have their end tokens watched


@dataclass(frozen=True)
class FewShot(Learned):
    """``train`` says what is trained of the text encoder: "mlp" the feed-forward layers, "attn" all attention,
    "mlp-attn" both, "mlp-final-attn" the feed-forward layers and the last layer's attention.

    ``images`` pictures of the concept are taken from ``folder`` or, without one, sampled from the model itself in
    ``path`` steps with ``guidance``. It stops when their error under the concept's names is ``ratio`` times what it was
    under the empty prompt; and takes the last step back when the end tokens of kept prompts fall below ``cosine`` with
    what they were, or the error on kept pictures rises by more than ``worse`` of itself. 0 leaves a rule out. ``keep``
    weighs a loss that the paper does not have: the text states of kept prompts stay, in squares relative to their own.
    """

    steps: int = 160
    lr: float = 3e-4
    batch: int = 4
    train: str = "mlp-final-attn"
    folder: str = ""
    images: int = 4
    path: int = 20
    guidance: float = 4.0
    keep: float = 30.0
    ratio: float = 3.5
    cosine: float = 0.98
    worse: float = 0.05

    name: ClassVar[str] = "few_shot"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2405.07288"
    summary: ClassVar[str] = "a few steps that unlearn the concept's names in the text encoder, from a few pictures"
    when: ClassVar[str] = "for a named object or style, in seconds, with only the text encoder to ship"
    limits: ClassVar[str] = "whoever loads the stock text encoder has the concept back; the denoiser still draws it"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in PARTS:
            raise ErasecError(f"few_shot: option train is {self.train!r}", why=nearest(self.train, PARTS))
        if self.images < 1:
            raise ErasecError(f"few_shot: option images is {self.images}", why="it takes 1 or more")
        for name in ("keep", "ratio", "worse"):
            if getattr(self, name) < 0:
                raise ErasecError(f"few_shot: option {name} is {getattr(self, name)}", why="it takes 0 or more")
        if not 0 <= self.cosine < 1:
            raise ErasecError(f"few_shot: option cosine is {self.cosine}", why="it takes 0 or more, and less than 1")

    def sites(self, model: Model) -> tuple[Site, ...]:
        trained(model)
        found = [site for site in model.parameters if site.component in model.family.text_encoders and site.proj]
        found = [site for site in found if not self.rank or len(site.shape) == 2]
        last = max((_layer(site) for site in found), default=0)

        def wanted(site: Site) -> bool:
            if site.proj == "mlp":
                return "mlp" in self.train
            return _layer(site) == last if "final" in self.train else "attn" in self.train

        return tuple(site for site in found if wanted(site))

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        denoiser = Denoiser(model, context)
        name = model.family.text_encoders[0]
        encoder = load_encoder(model.source, name, model.merged().get(name, {})).to(denoiser.device)
        read = reader(encoder.requires_grad_(False), Texts(model.source), name)
        captions = learned.texts(concept, concept.phrases)
        held = learned.spread(["", *learned.texts(concept, concept.keep)], HELD, context.seed)
        before = denoiser.states(held)
        size = before.square().mean()
        shown = self.latents(denoiser, captions, context.seed)
        watch = self.watch(denoiser, shown, captions, held, context.seed)
        student = Student({name: encoder}, self.sites(model), self.rank, context.seed)

        def loss(chance: Generator) -> Losses:
            latents = shown[torch.randperm(len(shown), generator=chance)[torch.arange(self.batch) % len(shown)]]
            said = [captions[row] for row in torch.randint(len(captions), (self.batch,), generator=chance).tolist()]
            noise = torch.randn(latents.shape, generator=chance).to(latents)
            times = strata(self.batch, denoiser.steps, chance).to(latents.device)
            found = {"loss erase": -errors(denoiser, latents, noise, times, read(said)).mean()}
            if self.keep:
                some = torch.randint(len(held), (DRAWN,), generator=chance)
                moved = read([held[row] for row in some.tolist()]) - before[some]
                found["loss keep"] = self.keep * moved.square().mean() / size
            return found

        look = partial(watch.look, read)
        turn = Turn(student.trained, self.lr, loss, betas=(0.9, 0.98), eps=1e-6, decay=1e-8)
        run = self.fit([turn], student, model, concept, context, look=look, guard=self.too_far, enough=self.gone)
        if run.rolled_back and run.steps == 1:
            raise ErasecError(
                f"few_shot: the first step on {concept.name} already went too far", why=run.stopped,
                fix="lower lr, or loosen cosine or worse",
            )  # fmt: skip
        if run.rolled_back:  # what is left is not what was looked at last
            for name, value in look().items():
                run.curves[name].append(value)
        return self.edit(student, run, model, concept)

    def latents(self, denoiser: Denoiser, captions: Sequence[str], seed: int) -> Tensor:
        """The concept's pictures as latents (n, c, h, w) on the device."""
        if self.folder:
            return denoiser.encode(pictures(Path(self.folder).expanduser(), self.images, denoiser.size))
        return self.sampled(denoiser, learned.spread(captions, self.images, seed), seed)

    def sampled(self, denoiser: Denoiser, prompts: Sequence[str], seed: int) -> Tensor:
        seeds = learned.seeds(seed, len(prompts))
        return denoiser.sample(prompts, seeds, self.path, self.guidance).final.to(denoiser.device)

    def watch(
        self, denoiser: Denoiser, shown: Tensor, captions: Sequence[str], held: Sequence[str], seed: int
    ) -> Watch:  # fmt: skip
        own = learned.spread(captions, PANEL * len(shown[:PANEL]), seed)
        gone = Panel(denoiser, shown[:PANEL], own, self.batch, seed)
        drawn = held[:PANEL]
        rows = [prompt for prompt in drawn for _ in range(PANEL)]
        safe = Panel(denoiser, self.sampled(denoiser, drawn, seed + 1), rows, self.batch, seed + 1)
        return Watch(denoiser, gone, safe, held[:WATCHED])

    def too_far(self, curves: Mapping[str, Sequence[float]]) -> str:
        """What the drift guard says of the last measurements, "" where all is well."""
        cosine, worse = curves["cosine"][-1], curves["worse"][-1]
        if self.cosine and cosine < self.cosine:
            return f"end tokens of kept prompts fell to a cosine of {cosine:.3f} with what they were"
        if self.worse and worse > self.worse:
            return f"the error on kept pictures rose by {worse:.1%}"
        return ""

    def gone(self, curves: Mapping[str, Sequence[float]]) -> str:
        """What the stop rule says of the last measurement, "" to go on."""
        ratio = curves["ratio"][-1]
        return f"the error reached {ratio:.2f} of the empty prompt's" if self.ratio and ratio >= self.ratio else ""


class Panel:
    """Pictures with fixed noise at fixed timesteps, ``PANEL`` of each, and the prompt of each of these rows."""

    def __init__(self, denoiser: Denoiser, latents: Tensor, prompts: Sequence[str], batch: int, seed: int) -> None:
        self.denoiser, self.prompts, self.batch = denoiser, prompts, batch
        self.latents = latents.repeat_interleave(PANEL, 0)
        self.noise = denoiser.draw([seed * 1_000_003 + 500_000 + row for row in range(len(prompts))])
        places = torch.linspace(*SPAN, PANEL) * denoiser.steps
        self.times = places.long().repeat(len(latents)).to(latents.device)

    @torch.no_grad()
    def error(self, states: Tensor) -> float:
        """The mean error of the denoiser with these text states (n, t, d)."""
        parts = zip(*(each.split(self.batch) for each in (self.latents, self.noise, self.times, states)), strict=True)
        return float(torch.cat([errors(self.denoiser, *part) for part in parts]).mean())


class Watch:
    """Measures how far the concept has gone, and how far everything else.

    "ratio" is the error on the concept's pictures under its names over that under the empty prompt before; "cosine" the
    mean over kept prompts of that of their end token's state with what it was; "worse" the relative rise of the error
    on kept pictures.
    """

    def __init__(self, denoiser: Denoiser, gone: Panel, safe: Panel, held: Sequence[str]) -> None:
        self.gone, self.safe, self.held = gone, safe, held
        lasts = denoiser.model.last_tokens(held).to(denoiser.device) + 1
        self.ends = torch.arange(len(held), device=denoiser.device), lasts
        self.before = denoiser.states(held)[self.ends]
        self.empty = gone.error(denoiser.states([""] * len(gone.prompts)))
        self.still = safe.error(denoiser.states(safe.prompts))

    @torch.no_grad()
    def look(self, read: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
        cosines = functional.cosine_similarity(read(self.held)[self.ends], self.before)
        return {
            "ratio": self.gone.error(read(self.gone.prompts)) / self.empty,
            "cosine": float(cosines.mean()),
            "worse": self.safe.error(read(self.safe.prompts)) / self.still - 1,
        }


def reader(encoder: Any, texts: Texts, name: str) -> Callable[[Sequence[str]], Tensor]:
    """What gives text states (n, t, d) of prompts as ``encoder`` says them now, in float32, with gradient."""
    device = next(encoder.parameters()).device

    def read(prompts: Sequence[str]) -> Tensor:
        states: Tensor = encoder(texts.ids(prompts, name).to(device)).last_hidden_state
        return states.float()

    return read


def errors(denoiser: Denoiser, latents: Tensor, noise: Tensor, times: Tensor, states: Tensor) -> Tensor:
    """Mean squared error of the denoiser on each latent (n,), against the noise, or v where the model says v."""
    said = denoiser.predict(denoiser.noised(latents, noise, times), times, states)
    return (said - denoiser.target(latents, noise, times)).square().flatten(1).mean(1)


def strata(count: int, steps: int, chance: Generator) -> Tensor:
    """Timesteps (count,) within ``SPAN`` of the schedule, one from each of as many equal parts of it."""
    places = (torch.arange(count) + torch.rand(count, generator=chance)) / count
    return ((SPAN[0] + (SPAN[1] - SPAN[0]) * places) * steps).long()


def pictures(folder: Path, count: int, size: int) -> Tensor:
    """The first ``count`` pictures of a folder by name, (n, 3, size, size) in [-1, 1]; cropped to their centre square.

    Raises ErasecError where there is none, or one is damaged or less than half as large as the model's.
    """
    from PIL import Image, ImageOps

    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)[:count]
    if not found:
        why = "it holds no .png, .jpg or .jpeg" if folder.is_dir() else "there is no such folder"
        raise ErasecError(f"few_shot: no pictures in {folder}", why=why, fix="leave folder out: it samples its own")
    rows = []
    for path in found:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise ErasecError(f"few_shot: {path.name} is no picture", why=str(error), where=str(folder)) from error
        if 2 * min(picture.size) < size:
            raise ErasecError(
                f"few_shot: {path.name} is {picture.width} x {picture.height}", where=str(folder),
                why=f"the model makes pictures of {size} x {size}, and one may have half of that",
            )  # fmt: skip
        square = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(rows)


def _layer(site: Site) -> int:
    """The number of a text encoder's layer, from its tensor's name."""
    found = re.search(r"layers\.(\d+)\.", site.key)
    return int(found[1]) if found else -1
