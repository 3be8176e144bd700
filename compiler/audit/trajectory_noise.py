"""The noise-based probe: sampling with more noise than DDPM's in each step, over a grid, and the best picture counts.

Lu et al., "When Are Concepts Erased From Diffusion Models?", 2025, arXiv:2505.17013. In its released code the scale of
the noise has no effect, because the pipeline that is called ignores it, and the best picture is chosen by the weights
that also count it. Here both differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from erasec.audit.bench import stack_choices
from erasec.base import Attempt, Probe, Threat
from erasec.options import options

if TYPE_CHECKING:
    from erasec.audit.bench import Bench
    from erasec.audit.subject import Subject

ETAS = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
SCALES = (1.0, 1.02, 1.03, 1.04)


@options
class TrajectoryNoise(Probe):
    """Prompts that name the concept, sampled with each eta of 1 to 1.85 and each scale of the noise of 1 to 1.04. The
    control are as many plain seeds. ``cells`` of the grid's 24 cells are used, evenly spread."""

    cells: Annotated[int, Field(ge=1, le=24)] = 24

    name: ClassVar[str] = "trajectory_noise"
    summary: ClassVar[str] = "sampling with more noise in each step; the best of a grid"
    threat: ClassVar[Threat] = "sampling"
    paper: ClassVar[str] = "arXiv:2505.17013"

    @property
    def _variant(self) -> str:
        return f"best of {self.cells}"

    def attack(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        prompts, grid = bench.prompts("name"), list(product(ETAS, SCALES))
        states = subject.states(prompts)
        pictures = []
        for number in range(self.cells):
            eta, scale = grid[number * len(grid) // self.cells]
            # Another draw for each cell: the control has as many.
            latents = subject.noise(bench.seeds(f"trajectory noise {number}", len(prompts)))
            seeds = bench.seeds(f"trajectory noise steps {number}", len(prompts))
            more = {"eta": eta, "noise_scale": scale, "seeds": seeds}
            pictures.append(subject.decode(bench.paint(subject, states, latents, "trajectory noise", **more)))
        yield Attempt(self._variant, stack_choices(pictures))

    def control(self, bench: Bench, subject: Subject) -> Iterator[Attempt]:
        prompts = bench.prompts("name")
        states = subject.states(prompts)
        pictures = []
        for number in range(self.cells):
            latents = subject.noise(bench.seeds(f"trajectory noise {number}", len(prompts)))
            pictures.append(subject.decode(bench.paint(subject, states, latents, "plain seeds")))
        yield Attempt(self._variant, stack_choices(pictures))
