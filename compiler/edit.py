"""Edits as data: deltas by site, how they came to be, the one place where they meet weights, and the edit file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.checkpoint import read_header, read_tensor, save
from erasec.errors import ErasecError
from erasec.family import Site

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SUFFIX = ".edit.safetensors"


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
    """W -> W (I + left @ right); left (d_in, r), right (r, d_in): one linear map of what the site reads.

    Closed-form edits are this, and all their sites share one ``Remap``: it needs no weights to be computed or kept.
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
        """left and right in float32; or left @ right and None, where the product is cheaper to apply."""
        if 2 * self.rank < self.left.shape[0]:
            return self.left.float(), self.right.float()
        return (self.left @ self.right).float(), None


@dataclass(frozen=True, eq=False)
class Dense:
    """W -> W + value; value (d_out, d_in)."""

    value: Tensor

    def change(self, weight: Tensor) -> Tensor:
        """The change of W, float64 (d_out, d_in)."""
        return self.value.double()

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B (d_out, d_in) and A (d_in, d_in), float64, whose product is the change of W."""
        import torch

        return self.value.double(), torch.eye(self.value.shape[1], dtype=torch.float64)

    @property
    def rank(self) -> int:
        return min(self.value.shape)


Delta = LowRank | Remap | Dense
PARTS: dict[type[Delta], tuple[str, ...]] = {LowRank: ("left", "right"), Remap: ("left", "right"), Dense: ("value",)}


@dataclass(frozen=True)
class Edit:
    """What a pass returns. ``base`` is the digest of the model it was solved on; ``stats`` are its own measurements.

    ``concept`` names what it erases, several in one edit joined by ", ". ``asked`` and ``sums`` are what a closed-form
    pass needs to solve again without the model: the phrases to erase and to keep, and tensors by name, each by concept
    ("" for what belongs to none of them alone).
    """

    deltas: Mapping[Site, Delta]
    by: str
    concept: str
    params: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    stats: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    asked: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


def merge(weight: Tensor, deltas: Iterable[Delta]) -> Tensor:
    """``weight`` plus its deltas, in order, with one cast back to the weight's own dtype at the end.

    Remaps are composed in float64, d_in x d_in, and meet a weight of at most float32 in float32: the sum W + W D E
    keeps the edit to about 4e-7 of itself, at half the time. Anything else is summed in float64.
    """
    import torch

    steps = tuple(deltas)
    maps = tuple(step for step in steps if isinstance(step, Remap))
    if not steps:
        return weight
    if len(maps) == len(steps) and weight.dtype != torch.float64:
        wide = weight.float()
        left, right = composed(maps).single
        changed = torch.addmm(wide, wide, left) if right is None else torch.addmm(wide, wide @ left, right)
        return changed.to(weight.dtype)
    total = weight.double()
    for step in steps:
        total = total + step.change(total)
    return total.to(weight.dtype)


@lru_cache(maxsize=4)
def composed(maps: tuple[Remap, ...]) -> Remap:
    """One Remap that does what several do one after the other.

    (I + D1 E1)(I + D2 E2) - I = [D1, D2 + D1 E1 D2] [E1; E2].
    """
    import torch

    first, *rest = maps
    left, right = first.left.double(), first.right.double()
    for step in rest:
        moved = step.left.double()
        left = torch.cat([left, moved + left @ (right @ moved)], 1)
        right = torch.cat([right, step.right.double()])
    return first if not rest else Remap(left, right)


def write(path: Path, edits: Sequence[Edit], about: Mapping[str, Any], sums: bool = True) -> None:
    """Save edits, in the order in which they apply, as one file; ``about`` (plain data) is kept with them.

    Tensors are named by what they are: REMAP.left, SITE.left, SITE.right or SITE.value, and sums by concept. Factors
    keep their float64, so that applying the file gives the bytes of the build that wrote it.
    """
    tensors: dict[str, Tensor] = {}
    told = []
    for number, edit in enumerate(edits):
        maps: dict[int, str] = {}
        entries = []
        for site, delta in edit.deltas.items():
            name = f"{number}/{site.component}/{site.key}"
            if isinstance(delta, Remap):
                name = maps.setdefault(id(delta), f"{number}/remap.{len(maps)}")
            tensors |= {f"{name}.{key}": vars(delta)[key] for key in PARTS[type(delta)]}
            entries.append({"site": asdict(site), "kind": type(delta).__name__, "tensor": name})
        stored = edit.sums if sums else {}
        for concept, parts in stored.items():
            tensors |= {f"{number}/sums/{concept}/{key}": value for key, value in parts.items()}
        told.append({
            "by": edit.by, "concept": edit.concept, "params": dict(edit.params), "base": edit.base,
            "stats": dict(edit.stats), "deltas": entries,
            "sums": {concept: sorted(parts) for concept, parts in stored.items()},
            "asked": {concept: dict(phrases) for concept, phrases in edit.asked.items()},
        })  # fmt: skip
    content = {"format": FORMAT, "about": dict(about), "edits": told}
    save(path, tensors, {"erasec.edit": json.dumps(content, sort_keys=True, ensure_ascii=False)})


def read(path: Path) -> tuple[tuple[Edit, ...], dict[str, Any]]:
    """The edits of a file, and what it says about them. Raises ErasecError where it is no edit file of erasec."""
    if not path.is_file():
        raise ErasecError(f"there is no edit file {path}", fix="erasec build MODEL --erase CONCEPT --target edit")
    entries, metadata = read_header(path)
    try:
        content = json.loads(metadata["erasec.edit"])
        if content["format"] > FORMAT:
            raise ErasecError(
                f"{path.name} has edit format {content['format']}", why=f"this erasec knows formats up to {FORMAT}",
                fix="pip install --upgrade erasec",
            )  # fmt: skip
        edits = tuple(_edit(number, told, entries) for number, told in enumerate(content["edits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ErasecError(
            f"{path.name} is no edit file of erasec", why="its metadata does not describe edits", where=str(path),
            fix="an edit file is written by: erasec build MODEL --erase CONCEPT --target edit",
        ) from error  # fmt: skip
    return edits, content["about"]


def _edit(number: int, told: Mapping[str, Any], entries: Mapping[str, Any]) -> Edit:
    kinds = {kind.__name__: kind for kind in PARTS}
    made: dict[str, Delta] = {}
    deltas = {}
    for item in told["deltas"]:
        name = item["tensor"]
        if name not in made:
            kind = kinds[item["kind"]]
            made[name] = kind(*(read_tensor(entries[f"{name}.{part}"]) for part in PARTS[kind]))
        deltas[Site(**{**item["site"], "shape": tuple(item["site"]["shape"])})] = made[name]
    sums = {
        concept: {key: read_tensor(entries[f"{number}/sums/{concept}/{key}"]) for key in keys}
        for concept, keys in told["sums"].items()
    }
    fields = {name: told[name] for name in ("by", "concept", "params", "base", "stats", "asked")}
    return Edit(deltas, sums=sums, **fields)
