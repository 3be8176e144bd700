"""Double Projections: the erased states lose everything that the kept states do not have.

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

    With ``target`` "safe" the first projection makes the target of a state its own projection on the kept states. With
    "anchor" it is left out, and the target is the anchor's state. ``ridge`` and ``relative`` have no effect.

    The paper projects on safe states that it does not list; here they are the kept ones. The map is then the orthogonal
    projector that removes what the erased states have besides the kept ones.
    """

    target: Literal["safe", "anchor"] = "safe"

    name: ClassVar[str] = "double_projection"
    paper: ClassVar[str] = "arXiv:2604.10032"
    summary: ClassVar[str] = "closed form without a ridge: erased text states are projected on the kept ones"
    when: ClassVar[str] = "as speed, where the erased states must reach their target exactly"

    def with_targets(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> System:
        if self.target == "anchor" or not system.shift.any():
            return system
        return System(system.source, -null_space.without(system.source, self.held(stream, sums)), system.keep)

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        return null_space.solve(system, self.held(stream, sums), 0.0, self.hold)
