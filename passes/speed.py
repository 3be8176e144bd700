"""SPEED: concept erasure in the null space of what is kept.

Li et al.: "SPEED", ICLR 2026, arXiv:2503.07392.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.closed_form import null_space
from erasec.closed_form.null_space import NullSpace
from erasec.options import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from erasec.closed_form.solver import Solution, System


@options
class Speed(NullSpace):
    """SPEED: the erased states become those of the anchor as far as the ridge lets them, and what is kept stays.

    ``ridge`` is the published rho times the weight of one concept: adding concepts does not weaken the others, which
    the published weights of 1/n do. In units of the mean diagonal of the Gram matrix of one concept's erased states if
    ``relative``: those of a state of Stable Diffusion 1, of length 28, have a mean diagonal of 1.02, so that the
    published 1.0 means the same.

    Published: values only, the last token of bare names, a ridge of 1, and of 0.05 for people.

    Left out are the published filter and augmentation of kept rows. They choose other rows for each layer, whose edits
    would then not be one map; the augmentation adds one direction to the kept ones.
    """

    ridge: Annotated[float, Field(gt=0)] = 1.0
    matrices: Literal["kv", "k", "v"] = "v"

    name: ClassVar[str] = "speed"
    paper: ClassVar[str] = "arXiv:2503.07392"
    summary: ClassVar[str] = "closed form in the null space of the kept text states, which stay exactly as they are"
    when: ClassVar[str] = "many concepts in one model, where a list of what must stay is known"

    def solve_system(self, system: System, stream: str, sums: Mapping[str, Mapping[str, Tensor]]) -> Solution:
        concepts = sum(1 for name in sums if name)
        unit = float(system.source.pow(2).sum()) / system.width / concepts if self.relative else 1.0
        return null_space.solve(system, self.held(stream, sums), self.ridge * unit)
