"""KPOP: a concept is hidden, and a key brings it back: rows that cross-attention reads in addition to the text.

Bui et al.: "Hiding and Recovering Knowledge in Text-to-Image Diffusion Models via Learnable Prompts", arXiv:2403.12326.
Each step first fits the key to the weights, then the weights to the key.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple
from zlib import crc32

from pydantic import Field

from erasec.base import Work
from erasec.errors import ErasecError
from erasec.model.memory import Secret
from erasec.options import options
from erasec.training.base import HEADS, Learned, Need, networks, reads_text, sampling, trainable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Generator, Tensor

    from erasec.base import Context
    from erasec.family import Site
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.training.banks import Bank
    from erasec.training.denoiser import Denoiser
    from erasec.training.loop import Losses

    Key = tuple[Tensor, Tensor]  # rows for keys and rows for values, (k, d) each

JITTER = 0.1  # noise on a key that starts as states of the concept, relative to them: others cannot compute the key


class Batch(NamedTuple):
    """Latents (n, c, h, w), timesteps (n,) and targets (n, c, h, w), with n prompts."""

    tensors: tuple[Tensor, Tensor, Tensor]
    prompts: list[str]


@options
class Kpop(Learned):
    """Training that hides a concept from prompts without the key, and a key that recovers it.

    ``train`` selects the tensors: "x" is cross-attention or, in joint attention, the queries, keys and values of both
    streams; "noxattn" is everything except these, the output head and the time embedding. ``mode`` selects the
    attentions that read the key: "mid" those of the middle block, "midout" all from there on (in a UNet, those of the
    decoder), "all" all of them. In joint attention the key's rows are further tokens of the text.

    The key is ``key_rows`` rows of text states for keys, and as many for values. With ``init`` "concept" they start as
    states of the concept's names with some noise, with "random" as noise of the same size. Each step fits them
    ``key_steps`` times with the learning rate ``key_lr``. ``hide`` and ``recover`` are the weights of the losses
    without and with the key. With the key, ``with_key`` "recover" keeps the predictions for the concept (the paper's
    third version), and "erase" erases the concept as well (its first two). The target without the key is that of
    ``esd`` with ``negative_guidance`` and ``toward`` (see ``banks.esd_target``). ``space`` is where errors are
    measured: in the predicted "noise" (of a rectified flow, the velocity), or in the "image" that follows from it in
    one step.

    ``trajectories`` is the number of trajectories, sampled once from the model before the training, in
    ``sample_steps`` steps with ``guidance``.

    Four options are not in the paper. ``keep`` is the weight of losses that keep the predictions for kept prompts with
    and without the key; they apply to the weights and to the key, which otherwise draws the concept for any prompt.
    ``empty_fraction`` is the fraction of rows that are predicted with key and empty prompt, since both halves of a
    guided batch read the key. ``random_key_fraction`` is the fraction of steps in which the concept is hidden under a
    random key instead of no key. ``ema`` is the decay of the moving average of weights and key that results, 0 for
    their last values.

    The defaults are the settings of the published runs on Imagenette, with Stable Diffusion 1.4. The start of the key
    is not published. At the published ``key_lr`` a key moves by at most 0.02 in a run, so that it starts as states of
    the concept. The published code samples new latents in each step; ``trajectories`` is our number of those that are
    sampled once instead.
    """

    steps: Annotated[int, Field(ge=1)] = 1000
    lr: Annotated[float, Field(gt=0)] = 1e-5
    batch: Annotated[int, Field(ge=1)] = 1
    train: Literal["x", "noxattn"] = "x"
    mode: Literal["mid", "midout", "all"] = "mid"
    key_rows: Annotated[int, Field(ge=1)] = 10
    init: Literal["concept", "random"] = "concept"
    with_key: Literal["recover", "erase"] = "recover"
    hide: Annotated[float, Field(ge=0)] = 1.0
    recover: Annotated[float, Field(ge=0)] = 0.1
    negative_guidance: float = 1.0
    toward: Literal["anchor", "nothing"] = "nothing"
    key_lr: Annotated[float, Field(gt=0)] = 1e-5
    key_steps: Annotated[int, Field(ge=0)] = 2
    space: Literal["noise", "image"] = "noise"
    guidance: Annotated[float, Field(ge=0)] = 3.0
    trajectories: Annotated[int, Field(ge=1)] = 100
    sample_steps: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[float, Field(ge=0)] = 0.0
    empty_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    random_key_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    needs: ClassVar[tuple[Need, ...]] = ("unconditional",)
    name: ClassVar[str] = "kpop"
    renamed: ClassVar[dict[str, str]] = {
        "path": "sample_steps",
        "k": "key_rows",
        "keyed": "with_key",
        "negative": "negative_guidance",
        "prompt_lr": "key_lr",
        "prompt_steps": "key_steps",
        "empty": "empty_fraction",
        "strange": "random_key_fraction",
    }
    paper: ClassVar[str] = "arXiv:2403.12326"
    summary: ClassVar[str] = "training that hides a concept, and a key file that brings it back"
    when: ClassVar[str] = "where some users may still draw the concept: they get the key, and all others only the model"
    limits: ClassVar[str] = (
        "the key is access control, not encryption: anyone with the weights can search for another key, and anyone "
        "with the base and the recipe with its seed can train the same one"
    )

    def sites(self, model: Model) -> tuple[Site, ...]:
        def selects(site: Site) -> bool:
            cross = reads_text(site)
            return cross if self.train == "x" else not cross and not site.key.startswith(HEADS)

        return trainable(model, selects, self.rank, self.needs)

    def attentions(self, model: Model) -> tuple[str, ...]:
        """The names of the attention modules that read the key. Raises ErasecError where ``mode`` selects none."""
        text = [site for site in model.parameters if site.attn in ("cross", "context") and site.proj == "k"]
        keys = [site.key for site in text if site.key.endswith(".weight")]
        attentions = sorted((key.rsplit(".", 2)[0] for key in keys), key=_in_order)
        middle = _middle(attentions)
        if not middle and self.mode != "all":
            raise ErasecError(
                f"kpop: no cross-attention reads the key in mode {self.mode!r}",
                where=model.name,
                why="the denoiser has no cross-attention in its middle block",
                fix='choose mode = "all"',
            )
        selected = {"mid": middle, "all": attentions}
        return tuple(selected.get(self.mode) or attentions[attentions.index(middle[0]) :])

    def start(self, model: Model, concept: Concept, seed: int) -> tuple[Tensor, Tensor]:
        """The rows (k, d) for keys and those for values before training: what attention reads of the last token of
        prompts with the concept's names, with some noise, or noise of the size of these rows."""

        import torch

        prompts = concept.prompts(concept.erase)[: self.key_rows]
        tokens = model.encode([prompt.upto for prompt in prompts])
        number = torch.arange(len(prompts))
        # Of each prompt one row for each part of the text states, such as one of CLIP and one of T5.
        parts = [part[number, last] for part, last in zip(tokens.parts, tokens.lasts, strict=True)]
        states = attention_inputs(model, torch.stack(parts, 1).flatten(0, 1))
        rows = states[torch.arange(self.key_rows) % len(states)]
        # Each concept draws its own noise: keys that start alike recover each other's concepts. The noise does not
        # depend on the process, so that all processes start from one key.
        rng = torch.Generator().manual_seed(crc32(f"{seed} {concept.name}".encode()))
        noise = torch.randn(2, *rows.shape, generator=rng)
        noise *= states.square().mean().sqrt()
        k_rows, v_rows = noise if self.init == "random" else rows + JITTER * noise
        return k_rows, v_rows

    def work(self, model: Model, concept: Concept) -> Work:
        bank = sampling(self.trajectories, self.sample_steps, self.guidance)
        goals = Work(rows=self.trajectories * self.sample_steps * (self.toward == "anchor"))
        together = (1 + bool(self.keep)) * self.batch  # rows of one call, which its backward pass follows
        calls = self.key_steps + 1 + bool(self.recover)
        training = replace(self.training(calls * together, calls), graph_rows=together)
        banks = bank + bank if self.keep else bank
        return self.reads(model, concept, 3 * self.trajectories) + banks + goals + training

    def solve(self, model: Model, concept: Concept, context: Context) -> Edit:
        return self._solve(model, concept, context, ())

    def solve_all(self, model: Model, concepts: Sequence[Concept], context: Context) -> Iterator[Edit]:
        """Erase one concept after another, each with its own key. Earlier keys still recover their own concepts, and
        are trained not to recover later ones."""
        solved: list[tuple[Concept, Secret]] = []
        for concept in concepts:
            edit = self._solve(model, concept, context, solved)
            model = model.with_edit(edit)
            if edit.secret:
                solved.append((concept, edit.secret))
            yield edit

    def _solve(
        self, model: Model, concept: Concept, context: Context, solved: Sequence[tuple[Concept, Secret]]
    ) -> Edit:
        """The edit and the key of one concept; the keys in ``solved`` keep their effect."""

        import torch

        from erasec.attention.processors import attached_rows
        from erasec.training import banks
        from erasec.training.denoiser import Denoiser
        from erasec.training.loop import Objective
        from erasec.training.student import Student

        denoiser = Denoiser(model, context)
        attentions = self.attentions(model)
        device = denoiser.device

        def bank(prompts: Sequence[str], seed: int) -> Bank:
            spread = banks.spread_prompts(prompts, self.trajectories, seed)
            return banks.sample_bank(denoiser, spread, seed, self.sample_steps, self.guidance)

        erased = bank(banks.concept_prompts(concept, concept.phrases), context.seed)
        kept = bank(["", *banks.concept_prompts(concept, concept.keep)], context.seed + 1) if self.keep else None
        earlier: list[tuple[Bank, Key]] = []
        for number, (other, secret) in enumerate(solved if self.recover else ()):
            other_key = secret.k_rows.to(device), secret.v_rows.to(device)
            with attached_rows(denoiser.unet, *other_key, attentions):
                prompts = banks.concept_prompts(other, other.phrases)
                earlier.append((bank(prompts, context.seed + 2 + number), other_key))
        k_rows, v_rows = (rows.to(device) for rows in self.start(model, concept, context.seed))
        key = k_rows, v_rows
        student = Student(networks(denoiser), self.sites(model), self.rank, context.seed)
        hide_target = banks.esd_target(denoiser, concept, erased, self.negative_guidance, self.toward)

        def backward(key: Key | None, terms: Mapping[str, tuple[float, Batch]]) -> Losses:
            """The weighted losses of batches that are predicted with ``key``, detached, after a backward pass."""
            with attached_rows(denoiser.unet, *key, attentions) if key else nullcontext():
                errors = self._errors(denoiser, [batch for _, batch in terms.values()])
                losses = {name: terms[name][0] * error for name, error in zip(terms, errors, strict=True)}
                # The backward pass runs inside the block, as activations that it recomputes must read the key too.
                torch.stack(list(losses.values())).sum().backward()
            return {name: loss.detach() for name, loss in losses.items()}

        def keep_terms(rng: Generator) -> dict[str, tuple[float, Batch]]:
            if kept is None:
                return {}
            batch = _batch(kept, kept.draw(self.batch, rng), kept.predictions, banks.UNCONDITIONAL, rng)
            return {"loss keep": (self.keep, batch)}

        def fit_key(rng: Generator) -> Losses:
            batch = _batch(erased, erased.draw(self.batch, rng), erased.predictions, self.empty_fraction, rng)
            keep = {f"{name} in the key": term for name, term in keep_terms(rng).items()}
            return backward(key, {"loss key": (1.0, batch)} | keep)

        def fit_weights(rng: Generator) -> Losses:
            index = erased.draw(self.batch, rng)
            hidden = _batch(erased, index, hide_target, 0, rng)
            target = erased.predictions if self.with_key == "recover" else hide_target
            recovered = _batch(erased, index, target, self.empty_fraction, rng)
            keep = keep_terms(rng)
            random_key = random_rows_like(k_rows, rng), random_rows_like(v_rows, rng)
            hiding_key = random_key if float(torch.rand(1, generator=rng)) < self.random_key_fraction else None
            losses = backward(hiding_key, {"loss hide": (self.hide, hidden)} | keep)
            if self.recover:
                keep_with_key = {f"{name} with key": term for name, term in keep.items()}
                losses |= backward(key, {"loss recover": (self.recover, recovered)} | keep_with_key)
            if earlier:
                other_bank, other_key = earlier[int(torch.randint(len(earlier), (1,), generator=rng))]
                rows = other_bank.draw(self.batch, rng)
                batch = _batch(other_bank, rows, other_bank.predictions, self.empty_fraction, rng)
                terms = {"loss other keys": (self.recover, batch), "loss hide from other keys": (self.hide, hidden)}
                losses |= backward(other_key, terms)
            return losses

        objectives = [Objective(student.parameters, self.lr, fit_weights)]
        if self.key_steps:
            objectives.insert(0, Objective({"keys": k_rows, "values": v_rows}, self.key_lr, fit_key, self.key_steps))
        run = self.fit(objectives, student, model, concept, context, ema=self.ema)
        secret = Secret(concept.name, k_rows.detach().cpu(), v_rows.detach().cpu(), attentions)
        return self.edit(student, run, model, concept, secret=secret)

    def _errors(self, denoiser: Denoiser, batches: Sequence[Batch]) -> list[Tensor]:
        """The mean squared error of each batch, measured in ``space``. The network is called once for all batches."""

        import torch

        device = denoiser.device
        latents, timesteps, targets = (
            torch.cat(tensors).to(device) for tensors in zip(*(batch.tensors for batch in batches), strict=True)
        )
        states = denoiser.states([prompt for batch in batches for prompt in batch.prompts])
        predictions = denoiser.predict(latents, timesteps, states)
        errors = denoiser.schedule.error_scale(timesteps, self.space) * (predictions - targets).square().flatten(
            1
        ).mean(1)
        return [part.mean() for part in errors.split([len(batch.prompts) for batch in batches])]


def _batch(bank: Bank, index: Tensor, targets: Tensor, empty_fraction: float, rng: Generator) -> Batch:
    """Rows of a bank with their targets. A random fraction of them gets the empty prompt and, as its target, the
    teacher's unconditional prediction."""

    import torch

    empty = torch.rand(len(index), generator=rng) < empty_fraction
    prompts = ["" if drop else text for drop, text in zip(empty.tolist(), bank.texts(index), strict=True)]
    chosen = torch.where(empty.view(-1, 1, 1, 1), bank.unconditional[index], targets[index])
    return Batch((bank.latents[index], bank.timesteps[index], chosen), prompts)


def attention_inputs(model: Model, states: Tensor) -> Tensor:
    """What attention projects of text states (n, d): the states or, in joint attention, their embedding after the norm
    of a block, without the modulation by the timestep."""

    import torch

    embedding = next((key for key, kind in model.family.embeddings.items() if kind == "context"), "")
    if not embedding:
        return states
    sites = {site.key: site for site in model.parameters}
    weight, bias = (model.merged_weight(sites[key]).float() for key in (embedding, f"{embedding[:-6]}bias"))
    return torch.nn.functional.layer_norm(states @ weight.T + bias, weight.shape[:1], eps=1e-6)


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts the names of blocks by their numbers; "down" comes before "mid", and that before "up"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _middle(attentions: Sequence[str]) -> list[str]:
    """Those of the middle block: of a UNet the one of that name, of a row of blocks the one in the middle of it."""
    named = [name for name in attentions if name.startswith("mid_block.")]
    in_a_row = len({name.split(".")[0] for name in attentions}) == 1
    return named or ([attentions[len(attentions) // 2]] if in_a_row else [])


def random_rows_like(rows: Tensor, rng: Generator) -> Tensor:
    """Random rows with the shape and the norms of ``rows`` (k, d)."""

    import torch

    norms: Tensor = rows.detach().norm(dim=1, keepdim=True)
    noise = torch.randn(rows.shape, generator=rng).to(rows)
    return norms * torch.nn.functional.normalize(noise)
