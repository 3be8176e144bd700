"""Edits as data: deltas by site, how they came to be, and the one place where they meet weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.family import Site


@dataclass(frozen=True)
class LowRank:
    """W -> W + left @ right; left (d_out, r), right (r, d_in). Closed-form edits share one ``right`` over all sites."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The change of W, float64 (d_out, d_in)."""
        return self.left.double() @ self.right.double()

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])


@dataclass(frozen=True)
class Dense:
    """W -> W + value; value (d_out, d_in)."""

    value: Tensor

    def dense(self) -> Tensor:
        """The change of W, float64 (d_out, d_in)."""
        return self.value.double()

    @property
    def rank(self) -> int:
        return min(self.value.shape)


Delta = LowRank | Dense


@dataclass(frozen=True)
class Edit:
    """What a pass returns. ``base`` is the digest of the model it was solved on; ``stats`` are its own measurements."""

    deltas: Mapping[Site, Delta]
    by: str
    concept: str
    params: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    stats: Mapping[str, float] = field(default_factory=dict)


def merge(weight: Tensor, deltas: Iterable[Delta]) -> Tensor:
    """``weight`` plus its deltas: the sum in float64, one cast back to the weight's own dtype at the end."""
    total = weight.double()
    for delta in deltas:
        total = total + delta.dense()
    return total.to(weight.dtype)
