"""Inversion of pictures into noise without any text: the noise from which a model paints them with the empty prompt.

TINA+, a preprint of 2026: the latents of each step of an inversion of DDIM are refined by a fixed-point loss and a loss
that keeps their energy that of noised pictures. Fixed points of inversion are those of Pan et al., "Effective Real
Image Editing with Accelerated Iterative Diffusion Inversion", ICCV 2023, arXiv:2309.04907.

Any deterministic sampler can carry a picture through noise, also one whose model knows nothing: published, inversion
without the second loss finds a style in 48 % of the pictures of an untrained model, with it in none. The rates of the
untrained model and of the twin decide whether a rate of this probe says anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from erasec.audit.sampler import Schedule, add_noise, make_schedule
from erasec.base import Attempt, Probe, Threat
from erasec.options import options
from erasec.progress import bar

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject

MARGINAL = 0.1  # share of the schedule, the one with little noise, in which latents start as noised pictures
PURPOSE = "null text"


@options
class NullText(Probe):
    """Pictures of the concept by the base are inverted step by step into noise by the audited model with the empty
    prompt, and painted again from it with the empty prompt, without guidance. The variants are the fixed-point loss
    alone, and with the loss of energy. The control are pictures of other things.

    Each step has ``refinements`` steps of AdamW. The second loss has the weight ``energy``, and begins where the
    squared norm of the latents is more than ``tolerance`` away from the one that is expected of noised pictures; at
    little noise it is left out. Published: 25 refinements in 50 steps, lr 0.001, energy 1, tolerance 10. What the
    published tolerance is a difference of was not found; here it is one of squared norms.
    """

    refinements: Annotated[int, Field(ge=1)] = 10
    lr: Annotated[float, Field(gt=0)] = 0.01
    energy: Annotated[float, Field(gt=0)] = 1.0
    tolerance: Annotated[float, Field(ge=0)] = 10.0

    name: ClassVar[str] = "null_text"
    summary: ClassVar[str] = "pictures of the concept, inverted into noise and painted again without text"
    threat: ClassVar[Threat] = "weights"
    needs_base: ClassVar[bool] = True
    limits: ClassVar[str] = (
        "It does not separate on glyphs: of 10 pictures, a model that never saw the concept gives back 8 with the loss "
        "of energy and 10 without, and an untrained one 2 and 10."
    )

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._both(bench, subject, "name")

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        yield from self._both(bench, subject, "keep")

    def _both(self, bench: Bench, subject: Subject, group: str) -> Iterator[Attempt]:
        count = bench.settings.images
        pictures = bench.targets(group)
        pictures = pictures[torch.arange(count) % len(pictures)]
        states = subject.states([""]).expand(count, -1, -1)
        for variant, energy in (("fixed point", 0.0), ("fixed point and energy", self.energy)):
            noise, residual = self.invert(bench, subject, pictures, energy)
            painted = bench.paint(subject, states, noise, PURPOSE, guidance=1.0)
            measured = {
                "residual": residual,
                "norm": float(noise.pow(2).mean().sqrt()),  # 1 for noise
                "error": float((painted - pictures).pow(2).mean().sqrt()),
            }
            yield Attempt.single(variant, subject.decode(painted), measured=measured)

    def invert(self, bench: Bench, subject: Subject, pictures: Tensor, energy: float) -> tuple[Tensor, float]:
        """The noise (n, c, h, w) of latents of pictures (n, c, h, w), on the CPU, and the root mean square of what is
        missing from a fixed point, over all steps."""
        schedule = make_schedule(subject.model, bench.settings.steps)
        drawn = subject.noise(bench.seeds(PURPOSE, len(pictures)))
        parts, residuals = [], []
        with bar(f"null_text, {subject.role}", len(pictures) * len(schedule)) as advance:
            for start in range(0, len(pictures), subject.batch):
                clean = pictures[start : start + subject.batch].to(subject.device)
                noise = drawn[start : start + subject.batch].to(subject.device)
                latents = clean
                for number in reversed(range(len(schedule))):
                    latents, residual = self._back(subject, schedule, number, latents, clean, noise, energy)
                    residuals.append(residual)
                    advance(len(latents))
                parts.append(latents.cpu())
        return torch.cat(parts), (sum(residuals) / len(residuals)) ** 0.5

    def _back(
        self,
        subject: Subject,
        schedule: Schedule,
        number: int,
        after: Tensor,
        clean: Tensor,
        noise: Tensor,
        energy: float,
    ) -> tuple[Tensor, float]:
        """The latents (n, c, h, w) before step ``number`` of DDIM, whose latents after the step are ``after``, and the
        mean square of what is missing from that."""
        alpha, following = schedule.alphas[number], schedule.following[number]
        timestep = schedule.timesteps[number]
        empty = subject.states([""]).to(subject.device).expand(len(after), -1, -1)
        # DDIM's step, solved for the latents before it.
        scale = (alpha / following) ** 0.5
        share = (1 - alpha) ** 0.5 - scale * (1 - following) ** 0.5

        def residuals(latents: Tensor) -> Tensor:
            missing: Tensor = latents - (scale * after + share * subject.predict(latents, timestep, empty))
            return missing

        late = timestep >= MARGINAL * subject.denoiser.steps
        with torch.no_grad():
            if energy and not late:
                free = add_noise(clean, noise, alpha)
            else:
                free = scale * after + share * subject.predict(after, timestep, empty)
        expected = alpha * clean.pow(2).sum((1, 2, 3)) + (1 - alpha) * clean[0].numel()
        free = free.detach().requires_grad_(True)
        optimizer = torch.optim.AdamW([free], lr=self.lr, weight_decay=0.0)
        for _ in range(self.refinements):
            loss = residuals(free).pow(2).sum()
            if energy and late:
                excess = (free.pow(2).sum((1, 2, 3)) - expected).abs() - self.tolerance
                loss = loss + energy * excess.clamp(min=0).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return free.detach(), float(residuals(free).pow(2).mean())
