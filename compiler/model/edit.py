"""Edits as data: changes of weights by site, where they come from, and how they are merged into the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from erasec.checkpoint.safetensors import tensors_digest
from erasec.family import Site
from erasec.model.memory import Memory, Secret, pack_extras
from erasec.model.threads import fixed_threads

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """W -> W + left @ right; left (d_out, r), right (r, d_in)."""

    left: Tensor
    right: Tensor

    def change(self, weight: Tensor) -> Tensor:
        """The change of W, float64 (d_out, d_in)."""
        return self.left.double() @ self.right.double()

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B (d_out, r) and A (r, d_in), float64, whose product is the change of W."""
        return self.left.double(), self.right.double()

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])


@dataclass(frozen=True, eq=False)
class Remap:
    """W -> W (I + left @ right); left (d_in, r), right (r, d_in): a linear map of the site's input.

    Closed-form edits are of this kind. All their sites share one ``Remap``, which does not depend on the weights.
    """

    left: Tensor
    right: Tensor

    def change(self, weight: Tensor) -> Tensor:
        """The change of W (d_out, d_in), float64."""
        return (weight.double() @ self.left) @ self.right

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B (d_out, r) and A (r, d_in), float64, whose product is the change of W."""
        return weight.double() @ self.left, self.right

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    @cached_property
    def single(self) -> tuple[Tensor, Tensor | None]:
        """left and right in float32; or (left @ right, None), where that is cheaper to apply."""
        if 2 * self.rank < self.left.shape[0]:
            return self.left.float(), self.right.float()
        return (self.left @ self.right).float(), None


@dataclass(frozen=True, eq=False)
class Dense:
    """W -> W + value. ``value`` has the shape of W, which need not be a matrix."""

    value: Tensor

    def change(self, weight: Tensor) -> Tensor:
        """The change of W, float64."""
        return self.value.double()

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B (d_out, d_in) and A (d_in, d_in), float64, whose product is the change of W."""
        import torch

        return self.value.double(), torch.eye(self.value.shape[1], dtype=torch.float64)

    @property
    def rank(self) -> int:
        """The highest rank that a change of this shape can have. A bias counts as one column, and a convolution kernel
        as a matrix with a row for each output channel."""
        outputs = self.value.shape[0]
        return min(outputs, max(1, self.value.numel() // outputs))


# A change of one weight.
Delta = LowRank | Remap | Dense
# The tensors of each kind of change, as edit files name them.
PARTS: dict[type[Delta], tuple[str, ...]] = {LowRank: ("left", "right"), Remap: ("left", "right"), Dense: ("value",)}


@dataclass(frozen=True)
class Edit:
    """What a pass returns.

    ``deltas`` are changes of weights by site; ``by`` is the name of the pass and ``params`` are its options;
    ``concepts`` are the names of the erased concepts. ``base`` is the digest of the model that the edit was solved on,
    "" where the edit fits any model with its sites. ``stats`` are measurements, and ``curves`` measurements for each
    step.

    ``phrases`` is ``Concept.record`` by concept; with ``sums``, a closed-form pass can solve again without the model.
    ``sums`` holds, by concept, tensors by name, and under "" those that belong to no single concept.

    An edit may also carry ``memories``; new ``tokens``, by name the row (d) of the token embedding; and a ``negative``
    prompt, used where the user gives none. Only some targets can hold these. Edit files leave out ``curves`` and
    ``secret``.
    """

    deltas: Mapping[Site, Delta]
    by: str
    concepts: tuple[str, ...]
    base: str
    params: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    stats: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    phrases: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    memories: tuple[Memory, ...] = ()
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    negative: str = ""
    secret: Secret | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


def edit_digest(edit: Edit) -> str:
    """sha256 of what an edit changes: the tensors of its deltas, its memories, new tokens and negative prompt."""
    remaps: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for site, delta in edit.deltas.items():
        name = f"{site.component}/{site.key}"
        kinds[name] = type(delta).__name__
        if isinstance(delta, Remap):  # which sites share
            kinds[name] = name = remaps.setdefault(id(delta), name)
        tensors |= {f"{name}.{part}": vars(delta)[part] for part in PARTS[type(delta)]}
    extra_tensors, extra = pack_extras(edit.memories, edit.tokens, edit.negative)
    text = json.dumps([kinds, extra], sort_keys=True)
    return hashlib.sha256(f"{tensors_digest({**tensors, **extra_tensors})}\n{text}".encode()).hexdigest()


@fixed_threads()
def merge(weight: Tensor, deltas: Iterable[Delta]) -> Tensor:
    """``weight`` with its deltas, in their order, cast back to the weight's own dtype once at the end.

    Remaps are composed in float64, d_in x d_in. The result is applied in float32 to a weight of float32 or less: W + W
    D E then has the change with a relative error of about 4e-7, in half the time. All other deltas are summed in
    float64.
    """
    import torch

    sequence = tuple(deltas)
    remaps = tuple(delta for delta in sequence if isinstance(delta, Remap))
    if not sequence:
        return weight
    if len(remaps) == len(sequence) and weight.dtype != torch.float64:
        single = weight.float()
        left, right = compose(remaps).single
        merged = torch.addmm(single, single, left) if right is None else torch.addmm(single, single @ left, right)
        return merged.to(weight.dtype)
    total = weight.double()
    for delta in sequence:
        total = total + delta.change(total)
    return total.to(weight.dtype)


@lru_cache(maxsize=4)
def compose(remaps: tuple[Remap, ...]) -> Remap:
    """One Remap that is equal to several applied one after the other.

    (I + D1 E1)(I + D2 E2) - I = [D1, D2 + D1 E1 D2] [E1; E2].
    """
    import torch

    first, *rest = remaps
    left, right = first.left.double(), first.right.double()
    for remap in rest:
        added = remap.left.double()
        left = torch.cat([left, added + left @ (right @ added)], 1)
        right = torch.cat([right, remap.right.double()])
    return first if not rest else Remap(left, right)
