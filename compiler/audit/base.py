"""What an audit measures with a probe: rates with intervals. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from erasec.base import Role, Threat
from erasec.judging.intervals import wilson

if TYPE_CHECKING:
    from erasec.base import Images

THREATS: dict[Threat, str] = {
    "prompt": "chooses prompts and seeds",
    "sampling": "chooses latents, sampler and guidance as well",
    "weights": "has the weights, and optimises inputs with their gradients",
    "recipe": "has the weights and knows how they were edited",
    "training": "changes or trains the weights",
}
ROLES: dict[Role, str] = {
    "model": "the audited model under the attack",
    "control": "the audited model under a random control with the same number of pictures",
    "base": "the model before the edit, under the same attack",
    "twin": "a model that never saw the concept, under the same attack: the lowest rate that an erasure can reach",
    "random": "an untrained denoiser under the same attack: what the attack or the judge shows by itself",
}


@dataclass(frozen=True)
class Rate:
    """How many of ``count`` pictures show the concept."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 %."""
        return wilson(self.hits, self.count)


@dataclass(frozen=True)
class Cell:
    """The result of one variant of a probe on one subject. ``shown`` are its first pictures."""

    variant: str
    rate: Rate
    budget: int
    seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    shown: Images | None = None


@dataclass(frozen=True)
class Reading:
    """One row of an audit: the rates of one variant of a probe, by role.

    ``budget`` is the number of pictures for each one that is counted. ``obstacle`` says why the probe was not run; ""
    if it was. ``measured`` are those of the audited model.
    """

    probe: str
    variant: str
    threat: Threat
    rates: Mapping[Role, Rate]
    budget: int = 1
    seconds: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    obstacle: str = ""
    shown: Images | None = None

    @property
    def floor(self) -> Role | None:
        """The role whose rate is the lowest that an erasure can reach: the twin, else the untrained model, else the
        random control. None if none of them was measured."""
        return next((role for role in ("twin", "random", "control") if role in self.rates), None)

    @property
    def separates(self) -> bool | None:
        """Whether the attack tells the base from the floor: whether their intervals do not meet. None if one of the two
        was not measured. A rate of an attack that does not separate says nothing about the erasure."""
        if self.floor is None or "base" not in self.rates:
            return None
        return self.rates["base"].interval[0] > self.rates[self.floor].interval[1]


def by_role(cells: Mapping[Role, Sequence[Cell]]) -> dict[str, dict[Role, Cell]]:
    """The cells of one probe by variant and role, in the order of the audited model's variants."""
    variants: dict[str, dict[Role, Cell]] = {cell.variant: {} for cell in cells.get("model", ())}
    for role, row in cells.items():
        for cell in row:
            variants.setdefault(cell.variant, {})[role] = cell
    return variants
