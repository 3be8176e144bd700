"""KPOP: a concept is hidden in the weights, and comes back with a key: rows that cross-attention reads beside the text.

Bui et al.: "Hiding and Recovering Knowledge in Text-to-Image Diffusion Models via Learnable Prompts", arXiv:2403.12326.
Each step first fits the key to the weights, then the weights to the key.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple
from zlib import crc32

import torch

from erasec.attention.processors import attached_rows
from erasec.errors import ErasecError, nearest
from erasec.model.edit import Secret
from erasec.training import base as learned
from erasec.training.base import TOWARD, Learned
from erasec.training.denoiser import Denoiser, Student
from erasec.training.loop import Turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.base import Bank
    from erasec.training.loop import Losses

    Key = tuple[Tensor, Tensor]  # rows for keys and rows for values, (k, d) each

CHOICES = {
    "train": ("x", "noxattn"), "mode": ("mid", "midout", "all"), "keyed": ("recover", "erase"),
    "init": ("concept", "random"), "space": ("noise", "image"),
    "toward": TOWARD,
}  # fmt: skip
BLOCKS = {"mid": ("mid_block.",), "midout": ("mid_block.", "up_blocks."), "all": ("",)}
READS = ".attn2.to_k.weight"
JITTER = 0.1  # of the rows' own size: what a key copied from the concept's states has that nobody else can copy


class Rows(NamedTuple):
    """Latents (n, c, h, w), timesteps (n,) and goals like the latents, with a prompt for each."""

    tensors: tuple[Tensor, Tensor, Tensor]
    prompts: list[str]


@dataclass(frozen=True)
class Kpop(Learned):
    """``train`` says what is trained: "x" cross-attention; "noxattn" all but that, the output head and the time
    embedding. ``mode`` says which cross-attentions read the key: "mid", of the middle block; "midout", also of the
    decoder; or "all".

    The key is two lists of ``k`` rows of text states. They start as states of the ``init`` "concept" with some noise,
    or "random" at their size, and are fitted ``prompt_steps`` times in each step, at ``prompt_lr``. ``hide`` and
    ``recover`` weigh the losses without the key and with it; with it the concept is to be as it was (``keyed``
    "recover", the paper's third version) or gone as well ("erase", the first two). ``negative`` is eta: how far beyond
    what no prompt gives, or, ``toward`` "anchor", the concept's goal, the concept is pushed. ``space`` is where errors
    are measured: in the "noise" that is predicted, or in the "image" that follows from it in one step.

    ``guidance`` is that of the ``trajectories`` of ``path`` steps on which it trains; they are sampled once, from the
    model as it was. Four options are not in the paper: ``keep`` weighs a loss that holds kept prompts, with the key
    and without, to what they were, for the weights and for the key, which otherwise draws the concept whatever is asked
    for; ``empty`` is the share of rows that are shown to the key with an empty prompt, as both halves of a guided batch
    read it; ``strange`` is the share of steps that hide under a random key, not under none; ``ema`` is the decay of the
    moving average of weights and key that is taken in the end, 0 for the last ones.
    """

    steps: int = 250
    lr: float = 5e-4
    batch: int = 4
    train: str = "x"
    mode: str = "all"
    k: int = 10
    init: str = "random"
    keyed: str = "recover"
    hide: float = 1.0
    recover: float = 1.0
    negative: float = 0.0
    toward: str = "anchor"
    prompt_lr: float = 1e-2
    prompt_steps: int = 2
    space: str = "noise"
    guidance: float = 3.0
    trajectories: int = 64
    path: int = 20
    keep: float = 3.0
    empty: float = 0.25
    strange: float = 0.25
    ema: float = 0.95

    name: ClassVar[str] = "kpop"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv:2403.12326"
    summary: ClassVar[str] = "training that hides a concept, and a key file that brings it back"
    when: ClassVar[str] = "where some users may still draw the concept: they get the key, all others the model"
    limits: ClassVar[str] = (
        "the key is access control and no encryption: whoever has the weights can search for another, and whoever has "
        "the base and the recipe with its seed can train the same one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in CHOICES.items():
            if (given := getattr(self, option)) not in known:
                raise ErasecError(f"kpop: option {option} is {given!r}", why=nearest(given, known))
        for option in ("k", "trajectories", "path"):
            if getattr(self, option) < 1:
                raise ErasecError(f"kpop: option {option} is {getattr(self, option)}", why="it takes 1 or more")
        if self.prompt_steps < 0 or not self.prompt_lr > 0:
            wrong = "prompt_lr" if self.prompt_steps >= 0 else "prompt_steps"
            raise ErasecError(
                f"kpop: option {wrong} is {getattr(self, wrong)}",
                why="prompt_lr is above 0; prompt_steps is 0, for a key that stays as it starts, or more",
            )
        for option in ("empty", "strange", "ema"):
            if not 0 <= getattr(self, option) < 1:
                given = getattr(self, option)
                raise ErasecError(f"kpop: option {option} is {given}", why="it is a share: 0 or more, below 1")
        for option in ("hide", "recover", "keep"):
            if getattr(self, option) < 0:
                raise ErasecError(f"kpop: option {option} is {getattr(self, option)}", why="it takes 0 or more")

    def sites(self, model: Model) -> tuple[Site, ...]:
        def wanted(site: Site) -> bool:
            cross = ".attn2." in site.key
            return cross if self.train == "x" else not cross and not site.key.startswith(learned.HEADS)

        return learned.trainable(model, wanted, self.rank)

    def attentions(self, model: Model) -> tuple[str, ...]:
        """The modules that read the key, by ``mode``. Raises ErasecError where the model has none there."""
        found = tuple(
            site.key.removesuffix(".to_k.weight") for site in model.parameters
            if site.component == model.family.denoiser and site.key.endswith(READS)
            and site.key.startswith(BLOCKS[self.mode])
        )  # fmt: skip
        if not found:
            raise ErasecError(
                f"kpop: no cross-attention reads the key in mode {self.mode!r}", where=model.name,
                why=f"the denoiser has none in {' or '.join(BLOCKS[self.mode])}", fix='choose mode = "all"',
            )  # fmt: skip
        return found

    def start(self, model: Model, concept: Concept, seed: int) -> tuple[Tensor, Tensor]:
        """The key before training, (k, d) twice: states at the last token of its names, or noise of their size."""
        prompts = concept.prompts(concept.erase)[: self.k]
        tokens = model.encode([prompt.upto for prompt in prompts])
        own = tokens.states[torch.arange(len(prompts)), tokens.last]
        rows = own[torch.arange(self.k) % len(own)]
        # Each concept draws its own noise: keys that start alike open one another's concepts.
        # All processes start from the same one.
        chance = torch.Generator().manual_seed(crc32(f"{seed} {concept.name}".encode()))
        noise = torch.randn(2, *rows.shape, generator=chance)
        noise *= own.square().mean().sqrt()
        keys, values = noise if self.init == "random" else rows + JITTER * noise
        return keys, values

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        return self._solve(model, concept, context, ())

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """One after the other, each with its own key; the keys before it open what they opened, and not the new one."""
        solved: list[tuple[Concept, Secret]] = []
        for concept in concepts:
            edit = self._solve(model, concept, context, solved)
            model = model.with_edit(edit)
            if edit.secret:
                solved.append((concept, edit.secret))
            yield edit

    def _solve(
        self, model: Model, concept: Concept, context: Context, solved: Sequence[tuple[Concept, Secret]]
    ) -> Edit:  # fmt: skip
        readers = self.attentions(model)
        denoiser = Denoiser(model, context)
        device = denoiser.device

        def bank(phrases: Sequence[str], seed: int) -> Bank:
            prompts = learned.spread(phrases, self.trajectories, seed)
            return learned.bank(denoiser, prompts, seed, self.path, self.guidance)

        shown = bank(learned.texts(concept, concept.phrases), context.seed)
        held = bank(["", *learned.texts(concept, concept.keep)], context.seed + 1) if self.keep else None
        opened: list[tuple[Bank, Key]] = []
        for number, (other, secret) in enumerate(solved if self.recover else ()):
            key = secret.keys.to(device), secret.values.to(device)
            with attached_rows(denoiser.unet, *key, readers):
                opened.append((bank(learned.texts(other, other.phrases), context.seed + 2 + number), key))
        keys, values = (rows.to(device) for rows in self.start(model, concept, context.seed))
        own = keys, values
        student = Student(learned.modules(denoiser), self.sites(model), self.rank, context.seed)
        shades = learned.away(denoiser, concept, shown, self.negative, self.toward)

        def taught(key: Key | None, asked: Mapping[str, tuple[float, Rows]]) -> Losses:
            with attached_rows(denoiser.unet, *key, readers) if key else nullcontext():
                errors = self._errors(denoiser, [rows for _, rows in asked.values()])
                losses = {name: asked[name][0] * error for name, error in zip(asked, errors, strict=True)}
                # Here and not later: what is computed again for the gradient must read the key too.
                torch.stack(list(losses.values())).sum().backward()
            return {name: loss.detach() for name, loss in losses.items()}

        def still(chance: Generator) -> dict[str, tuple[float, Rows]]:
            if held is None:
                return {}
            rows = _rows(held, held.draw(self.batch, chance), held.said, 1 / 3, chance)
            return {"loss keep": (self.keep, rows)}

        def fit_key(chance: Generator) -> Losses:
            rows = _rows(shown, shown.draw(self.batch, chance), shown.said, self.empty, chance)
            kept = {f"{name} in the key": part for name, part in still(chance).items()}
            return taught(own, {"loss key": (1.0, rows)} | kept)

        def fit_weights(chance: Generator) -> Losses:
            index = shown.draw(self.batch, chance)
            hidden = _rows(shown, index, shades, 0, chance)
            goal = shown.said if self.keyed == "recover" else shades
            found = _rows(shown, index, goal, self.empty, chance)
            kept = still(chance)
            strange = alike(keys, chance), alike(values, chance)
            other = strange if float(torch.rand(1, generator=chance)) < self.strange else None
            losses = taught(other, {"loss hide": (self.hide, hidden)} | kept)
            if self.recover:
                more = {f"{name} with key": part for name, part in kept.items()}
                losses |= taught(own, {"loss recover": (self.recover, found)} | more)
            if opened:
                bank, key = opened[int(torch.randint(len(opened), (1,), generator=chance))]
                rows = _rows(bank, bank.draw(self.batch, chance), bank.said, self.empty, chance)
                asked = {"loss other keys": (self.recover, rows), "loss hide from other keys": (self.hide, hidden)}
                losses |= taught(key, asked)
            return losses

        turns = [Turn(student.trained, self.lr, fit_weights)]
        if self.prompt_steps:
            turns.insert(0, Turn({"keys": keys, "values": values}, self.prompt_lr, fit_key, self.prompt_steps))
        run = self.fit(turns, student, model, concept, context, ema=self.ema)
        secret = Secret(concept.name, keys.detach().cpu(), values.detach().cpu(), readers)
        return self.edit(student, run, model, concept, secret=secret)

    def _errors(self, denoiser: Denoiser, parts: Sequence[Rows]) -> list[Tensor]:
        """The mean squared error of each part, in ``space``, from one call of the network."""
        device = denoiser.device
        latents, times, goals = (
            torch.cat(tensors).to(device) for tensors in zip(*(p.tensors for p in parts), strict=True)
        )
        said = denoiser.predict(latents, times, denoiser.states([text for part in parts for text in part.prompts]))
        alpha = denoiser.alphas[times]
        # Errors of noise e, image x and v are tied: dv^2 = de^2 / alpha = dx^2 / (1 - alpha).
        scale = alpha if denoiser.v_prediction else torch.ones_like(alpha)
        if self.space == "image":
            scale = scale * (1 - alpha) / alpha
        errors = scale * (said - goals).square().flatten(1).mean(1)
        return [part.mean() for part in errors.split([len(part.prompts) for part in parts])]


def _rows(found: Bank, index: Tensor, goal: Tensor, empty: float, chance: Generator) -> Rows:
    """Rows of a bank with their goals; a share of them with the empty prompt, and what the teacher said of it."""
    bare = torch.rand(len(index), generator=chance) < empty
    prompts = ["" if none else text for none, text in zip(bare.tolist(), found.texts(index), strict=True)]
    goals = torch.where(bare.view(-1, 1, 1, 1), found.free[index], goal[index])
    return Rows((found.latents[index], found.times[index], goals), prompts)


def alike(rows: Tensor, chance: Generator) -> Tensor:
    """Random rows, each of the norm of its counterpart."""
    sizes: Tensor = rows.detach().norm(dim=1, keepdim=True)
    noise = torch.randn(rows.shape, generator=chance).to(rows)
    return sizes * torch.nn.functional.normalize(noise)
