"""Banks: latents of sampled trajectories with the teacher's predictions; targets and losses that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from erasec.closed_form.token_rows import goal_prompts
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser, Trajectories


BATCH = 32  # rows in one call of the teacher
UNCONDITIONAL = 1 / 3  # fraction of the rows of a preservation loss that are predicted with the empty prompt


@dataclass(frozen=True)
class Bank:
    """Rows from the trajectories of ``prompts``, on the CPU: ``latents`` (m, c, h, w), their ``timesteps`` (m,), the
    index of their prompt (m,), and the teacher's predictions (m, c, h, w) with that prompt and with the empty one.

    ``guidance`` (m,) is the scale at which a network with distilled guidance predicted them, None for other networks.
    There each of the latents is a row at each of the scales (``Denoiser.guidances``).
    """

    prompts: tuple[str, ...]
    latents: Tensor
    timesteps: Tensor
    prompt_index: Tensor
    predictions: Tensor
    unconditional: Tensor
    guidance: Tensor | None = None

    def draw(self, count: int, rng: Generator) -> Tensor:
        """Indices (count,) of random rows, which may repeat."""
        return torch.randint(len(self.latents), (count,), generator=rng)

    def texts(self, index: Tensor) -> list[str]:
        """The prompts of the rows at ``index`` (n,)."""
        return [self.prompts[row] for row in self.prompt_index[index].tolist()]


def predict_rows(denoiser: Denoiser, bank: Bank, index: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
    """The denoiser's predictions (n, c, h, w) for the rows of a bank at ``index`` (n,), on its device: with the prompts
    of the rows, or with n others, and at the guidance of the rows."""
    latents, timesteps = bank.latents[index].to(denoiser.device), bank.timesteps[index].to(denoiser.device)
    states = denoiser.states(bank.texts(index) if prompts is None else prompts)
    return denoiser.predict(latents, timesteps, states, None if bank.guidance is None else bank.guidance[index])


def concept_prompts(concept: Concept, phrases: Sequence[str]) -> list[str]:
    """Each of the phrases in each template of the concept."""
    return [prompt.text for prompt in concept.prompts(phrases)]


def spread_prompts(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in a random order drawn from ``seed``. None repeats before all have been used."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [prompts[order[number % len(order)]] for number in range(count)]


def training_seeds(seed: int, count: int) -> list[int]:
    """Seeds for the initial noise of ``count`` samples.

    They differ from all seeds of a judge's panel, so that no judged image starts from noise that was trained on.
    """
    return [seed * 1_000_003 + 700_000 + number for number in range(count)]


def sample_bank(
    denoiser: Denoiser, prompts: Sequence[str], seed: int, sample_steps: int, guidance: float, part: slice = slice(None)
) -> Bank:
    """Sample one trajectory of ``sample_steps`` steps per prompt, and keep the steps in ``part``.

    The denoiser that samples is the teacher as well.
    """
    seeds = training_seeds(seed, len(prompts))
    trajectories = denoiser.sample(prompts, seeds, sample_steps, guidance, until=max(0, part.stop or 0))
    if denoiser.model.family.distilled or (guidance == 1 and any(prompts)):
        return score_trajectories(denoiser, prompts, trajectories, part, denoiser.guidances(guidance))
    predictions = trajectories.predictions[:, part].flatten(0, 1)
    # Without guidance all prompts are empty here, and their predictions are the unconditional ones.
    unconditional = predictions if guidance == 1 else trajectories.unconditional[:, part].flatten(0, 1)
    return _to_bank(prompts, trajectories, part, predictions, unconditional)


def sample_attacked(
    denoiser: Denoiser, prompts: Sequence[str], seed: int, sample_steps: int, guidance: float, copies: int
) -> Bank:
    """Latents from which an attacker may start: those of one trajectory per prompt, and ``copies`` noised versions of
    the picture in its end, at timesteps from the whole schedule.

    ``guidance`` is not 1.
    """
    seeds = training_seeds(seed, len(prompts))
    trajectories = denoiser.sample(prompts, seeds, sample_steps, guidance)
    predictions, unconditional = (t.flatten(0, 1) for t in (trajectories.predictions, trajectories.unconditional))
    sampled = _to_bank(prompts, trajectories, slice(None), predictions, unconditional)
    count, rng = len(prompts) * copies, torch.Generator().manual_seed(seed)
    # One timestep in each of ``count`` equal parts of the schedule, in a random order.
    parts = (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) / count
    timesteps = denoiser.schedule.grid.cpu()[(parts * denoiser.steps).long()]
    pictures = trajectories.final.repeat_interleave(copies, 0)
    noise = torch.randn(pictures.shape, generator=rng)
    noisy = denoiser.add_noise(*(value.to(denoiser.device) for value in (pictures, noise, timesteps))).cpu()
    rows = torch.arange(len(prompts)).repeat_interleave(copies)
    noised = _scored(denoiser, Bank(tuple(prompts), noisy, timesteps, rows, torch.empty(0), torch.empty(0)))
    values = ("latents", "timesteps", "prompt_index", "predictions", "unconditional")
    return Bank(tuple(prompts), *(torch.cat([getattr(sampled, value), getattr(noised, value)]) for value in values))


@torch.no_grad()
def score_trajectories(
    denoiser: Denoiser,
    prompts: Sequence[str],
    trajectories: Trajectories,
    part: slice = slice(None),
    guidances: Sequence[float] = (),
) -> Bank:
    """A bank of the denoiser's predictions on the latents of trajectories, which another denoiser may have sampled.

    With ``guidances``, each of the latents is a row at each of these scales.
    """
    bank = _to_bank(prompts, trajectories, part, torch.empty(0), torch.empty(0))
    if guidances:
        count, rows = len(guidances), torch.arange(len(bank.latents)).repeat(len(guidances))
        scales = torch.tensor(guidances).repeat_interleave(len(rows) // count)
        repeated = {name: getattr(bank, name)[rows] for name in ("latents", "timesteps", "prompt_index")}
        bank = replace(bank, guidance=scales, **repeated)
    return _scored(denoiser, bank)


def _scored(denoiser: Denoiser, bank: Bank) -> Bank:
    """``bank`` with the denoiser's predictions for its rows in place of its own."""
    unprompted = replace(bank, prompts=("",) * len(bank.prompts))
    return replace(bank, predictions=predict_bank(denoiser, bank), unconditional=predict_bank(denoiser, unprompted))


@torch.no_grad()
def predict_bank(denoiser: Denoiser, bank: Bank) -> Tensor:
    """The denoiser's prediction for each row of a bank with the prompt of the row, (m, c, h, w) on the CPU."""
    parts = []
    with bar("teacher", len(bank.latents)) as advance:
        for index in torch.arange(len(bank.latents)).split(BATCH):
            parts.append(predict_rows(denoiser, bank, index).cpu())
            advance(len(index))
    return torch.cat(parts)


def esd_target(denoiser: Denoiser, concept: Concept, bank: Bank, negative_guidance: float, toward: str) -> Tensor:
    """The target of ESD (arXiv:2303.07345, Eq. 8) for each row of a bank of the concept's prompts, (m, c, h, w), CPU.

    With ``toward`` "nothing" it is that of the paper: unconditional - negative_guidance (prediction - unconditional).
    With "anchor", the unconditional prediction is replaced by the one for the same prompt with the concept's goal in
    place of the concept. The rest of the prompt, such as a colour, then keeps its effect.
    """
    base = bank.unconditional
    if toward == "anchor":
        goals = [prompt.text for prompt in goal_prompts(concept, concept.phrases)]
        goal_of = dict(zip(concept_prompts(concept, concept.phrases), goals, strict=True))
        base = predict_bank(denoiser, replace(bank, prompts=tuple(goal_of[prompt] for prompt in bank.prompts)))
    return base - negative_guidance * (bank.predictions - base)


def preservation_loss(denoiser: Denoiser, bank: Bank, batch: int, noise: bool = False) -> Callable[[Generator], Tensor]:
    """A loss on ``batch`` random rows of a bank that keeps the student's predictions at the teacher's.

    It is the mean squared difference of the predictions; a third of the rows are predicted with the empty prompt. With
    ``noise``, predictions of v are compared as predictions of noise.
    """

    def loss(rng: Generator) -> Tensor:
        index = bank.draw(batch, rng)
        unprompted = torch.rand(batch, generator=rng) < UNCONDITIONAL
        prompts = ["" if empty else text for empty, text in zip(unprompted.tolist(), bank.texts(index), strict=True)]
        target = torch.where(unprompted.view(-1, 1, 1, 1), bank.unconditional[index], bank.predictions[index])
        residual = predict_rows(denoiser, bank, index, prompts) - target.to(denoiser.device)
        timesteps = bank.timesteps[index].to(denoiser.device)
        return (denoiser.as_noise(residual, timesteps) if noise else residual).square().mean()

    return loss


def _to_bank(
    prompts: Sequence[str], trajectories: Trajectories, part: slice, predictions: Tensor, unconditional: Tensor
) -> Bank:
    """A bank of the steps in ``part`` of each trajectory, one trajectory after another."""
    timesteps = trajectories.timesteps[part]
    index = torch.arange(len(prompts)).repeat_interleave(len(timesteps))
    latents = trajectories.latents[:, part].flatten(0, 1)
    return Bank(tuple(prompts), latents, timesteps.repeat(len(prompts)), index, predictions, unconditional)
