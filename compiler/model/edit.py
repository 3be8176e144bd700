"""Edits as data: deltas by site, how they came to be, the one place where they meet weights, and the edit file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erasec.checkpoint.safetensors import read_header, read_tensor, save
from erasec.errors import ErasecError
from erasec.family import Site

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2  # 1 where nothing is carried beside deltas: what knows that alone still reads those files
SUFFIX = ".edit.safetensors"
MERGED = "tensors/"  # before the names of merged tensors in an edit file


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
    """W -> W + value, of W's shape, whatever that is."""

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
        """The largest that a change of this shape can have; a bias is one column, a kernel a matrix of its outputs."""
        outputs = self.value.shape[0]
        return min(outputs, max(1, self.value.numel() // outputs))


Delta = LowRank | Remap | Dense
PARTS: dict[type[Delta], tuple[str, ...]] = {LowRank: ("left", "right"), Remap: ("left", "right"), Dense: ("value",)}


@dataclass(frozen=True, eq=False)
class Memory:
    """Constant keys and values (k, inner) that one attention of the denoiser reads beside the text; all heads in a row.

    ``attention`` is the module, such as "mid_block.attentions.0.transformer_blocks.0.attn2". With ``mode`` "joint" they
    are more tokens of the same softmax (KPOP); with "side" they are attended to alone, and the result is added
    ``weight`` times (EIUP). A side memory acts in the first ``until`` of the noise schedule, noisiest steps first:
    while t >= (1 - until) T; and, where ``guided``, on the prompted half of a guided batch alone.
    """

    attention: str
    keys: Tensor
    values: Tensor
    mode: Literal["joint", "side"] = "joint"
    weight: float = 1.0
    until: float = 1.0
    guided: bool = False


@dataclass(frozen=True, eq=False)
class Secret:
    """What brings a hidden concept back: rows (k, d) of text states, for keys and for values, that ``attentions`` read
    beside the text (KPOP, arXiv 2403.12326). It is no part of the edit: a build writes it as a key file."""

    concept: str
    keys: Tensor
    values: Tensor
    attentions: tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    """What a pass returns. ``base`` is the digest of the model it was solved on; ``stats`` are its own measurements.

    ``concept`` names what it erases, several in one edit joined by ", ". ``asked`` and ``sums`` are what a closed-form
    pass needs to solve again without the model: the phrases to erase and to keep, and tensors by name, each by concept
    ("" for what belongs to none of them alone).

    Beside deltas an edit may carry ``memories``; new ``tokens``, by name the row (d) of the token embedding; and a
    ``negative`` prompt, with which the denoiser is to be guided where the user gives none. Few formats hold these.
    ``curves`` are measurements by step of training, for the report; like ``secret`` they are in no edit file.
    """

    deltas: Mapping[Site, Delta]
    by: str
    concept: str
    params: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    stats: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    asked: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    memories: tuple[Memory, ...] = ()
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    negative: str = ""
    secret: Secret | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)


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


def write(
    path: Path, edits: Sequence[Edit], about: Mapping[str, Any], sums: bool = True,
    merged: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Save edits, in the order in which they apply, as one file; ``about`` (plain data) is kept with them.

    Tensors are named by what they are: REMAP.left, SITE.left, SITE.right or SITE.value, sums by concept, and what
    ``carried`` names. Factors keep their float64, so that applying the file gives the bytes of the build that wrote it.
    A secret and curves are left out. ``merged`` are tensors after all edits by "component/key", which are kept as
    tensors/COMPONENT/KEY.
    """
    tensors = {f"{MERGED}{name}": tensor for name, tensor in (merged or {}).items()}
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
        more, beside = carried(edit.memories, edit.tokens, edit.negative, f"{number}/")
        tensors |= more
        told.append({
            "by": edit.by, "concept": edit.concept, "params": dict(edit.params), "base": edit.base,
            "stats": dict(edit.stats), "deltas": entries,
            "sums": {concept: sorted(parts) for concept, parts in stored.items()},
            "asked": {concept: dict(phrases) for concept, phrases in edit.asked.items()},
            **beside,
        })  # fmt: skip
    more_than_deltas = any(edit.memories or edit.tokens or edit.negative for edit in edits)
    content = {"format": FORMAT if more_than_deltas else 1, "about": dict(about), "edits": told}
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
    memories, tokens, negative = named(told, entries, f"{number}/")
    return Edit(deltas, sums=sums, memories=memories, tokens=tokens, negative=negative, **fields)


def carried(
    memories: Sequence[Memory], tokens: Mapping[str, Tensor], negative: str, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and plain data, of what is carried beside deltas; nothing is said of what there is none of.

    Tensors are named PREFIXmemories/NUMBER/ATTENTION.keys, .values, and PREFIXtokens/NAME.
    """
    tensors = {f"{prefix}tokens/{name}": row for name, row in tokens.items()}
    told: dict[str, Any] = {}
    for number, memory in enumerate(memories):
        name = f"{prefix}memories/{number}/{memory.attention}"
        tensors |= {f"{name}.keys": memory.keys, f"{name}.values": memory.values}
        about = {key: getattr(memory, key) for key in ("attention", "mode", "weight", "until", "guided")}
        told.setdefault("memories", []).append(about)
    told |= {"tokens": list(tokens)} if tokens else {}
    told |= {"negative": negative} if negative else {}
    return tensors, told


def named(
    told: Mapping[str, Any], entries: Mapping[str, Any], prefix: str = ""
) -> tuple[tuple[Memory, ...], dict[str, Tensor], str]:
    """The memories, tokens and negative prompt that ``carried`` told of. Raises KeyError or TypeError for others."""
    memories = []
    for number, about in enumerate(told.get("memories", [])):
        name = f"{prefix}memories/{number}/{about['attention']}"
        memories.append(
            Memory(keys=read_tensor(entries[f"{name}.keys"]), values=read_tensor(entries[f"{name}.values"]), **about)
        )
    tokens = {name: read_tensor(entries[f"{prefix}tokens/{name}"]) for name in told.get("tokens", [])}
    return tuple(memories), tokens, told.get("negative", "")
