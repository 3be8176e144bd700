"""CURE: erased text states lose their part along the concept's own directions.

Das Biswas et al.: "CURE", NeurIPS 2025, arXiv:2505.12677.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from erasec.closed_form import null_space
from erasec.closed_form.base import unpack_system
from erasec.closed_form.null_space import NullSpace
from erasec.closed_form.solver import Solution, System
from erasec.options import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@options
class Cure(NullSpace):
    """CURE: M = I - P_f (I - P_r), with a soft projector P_f on the erased states and P_r on the kept ones.

    A direction of the erased states loses the share f = a s / ((a - 1) s + 1), where s is its share of their squared
    lengths and a is ``strength``; of one state everything is lost, whatever the strength. Kept states are projected in
    the same way, with ``keep_strength``. There is no anchor: what is erased becomes nothing. Of several concepts the
    maps are multiplied, because one map for all would fade with their number. ``ridge``, ``relative`` and ``hold`` have
    no effect.

    Published: a strength of 2, and of 5 for nudity. Which tokens were taken is not published.
    """

    strength: Annotated[float, Field(ge=1)] = 2.0
    keep_strength: Annotated[float, Field(ge=1)] = 2.0

    name: ClassVar[str] = "cure"
    paper: ClassVar[str] = "arXiv:2505.12677"
    summary: ClassVar[str] = "closed-form soft projector that removes the concept's own directions; no anchor"
    when: ClassVar[str] = "one concept that has no anchor"

    def with_targets(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> System:
        return System(system.source, -system.source if system.shift.any() else system.shift, system.keep)

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        import torch

        if not system.shift.any():  # the concept becomes itself
            return Solution(system.shift[:0].T, system.source[:0], 0.0, 1.0)
        kept, kept_weights = null_space.energy_weights(self.kept(stream, sums), self.keep_strength)
        identity = torch.eye(system.width, dtype=torch.float64)
        free = identity - (kept * kept_weights) @ kept.T
        matrix = identity
        for name in sorted(name for name in sums if name):
            rows = unpack_system(sums[name], stream).source
            directions, weights = null_space.energy_weights(rows, self.strength)
            matrix = matrix - (directions * weights) @ (directions.T @ free) @ matrix
        return Solution(matrix - identity, identity, 0.0, 1.0)
