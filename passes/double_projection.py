"""Double Projections: erased states lose what safe states do not have, and kept states do not move.

"Double Projections", CVPR 2026, arXiv:2604.10032. No code was published; the steps are those of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from erasec.closed_form import null_space
from erasec.closed_form.null_space import NullSpace
from erasec.closed_form.solver import System
from erasec.options import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from erasec.closed_form.solver import Solution


@options
class DoubleProjection(NullSpace):
    """Double Projections, the null-space edit without a ridge: erased states reach their target exactly.

    The target is the goal's own state. With ``target`` "safe" it is the projection of the state on those of the goals,
    the first of the two projections of the paper, which may be left out: of each prompt the part stays that a goal's
    prompt has as well, and where goals are like the concept, too much of it. ``ridge`` and ``relative`` have no effect.

    Which states are safe, and how many, is not published.
    """

    target: Literal["anchor", "safe"] = "anchor"

    name: ClassVar[str] = "double_projection"
    paper: ClassVar[str] = "arXiv:2604.10032"
    summary: ClassVar[str] = "closed form without a ridge: erased text states reach their goals, kept ones stay"
    when: ClassVar[str] = "as speed, where the erased states must reach their target exactly"

    def with_targets(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> System:
        if self.target == "anchor" or not system.shift.any():
            return system
        safe = null_space.held_directions(system.target(), self.hold)
        return System(system.source, -null_space.without(system.source, safe), system.keep)

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        return null_space.solve(system, self.held(stream, sums), 0.0, self.hold)
