"""Target lora: the change alone as low-rank factors, which diffusers' load_lora_weights, ComfyUI and A1111 load.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv:2106.09685: W -> W + alpha / r * up @ down. What an edit changes at a site is such a product already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, EditTarget
from erasec.checkpoint.safetensors import Entry, read_header, read_tensor, save, stream
from erasec.errors import ErasecError, nearest
from erasec.model.edit import Remap
from erasec.model.sidecar import gathered, refuse
from erasec.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from erasec.family import Site
    from erasec.model.edit import Delta
    from erasec.model.view import Model

# The first name that load_lora_weights looks for in a folder
FILE = "pytorch_lora_weights.safetensors"
SIZES = {"float32": 4, "float16": 2}
EXACT = 1e-10
# What A1111 knows the base by: it lists a file without this under SD 1.
MARKS = {
    "sd1": {"ss_base_model_version": "sd_v1"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}


@dataclass(frozen=True)
class Lora(EditTarget):
    """``rank`` 0 writes each site's change exactly; another cuts it to that rank by its largest singular values.

    ``dtype`` is that of the factors, float32 or float16. ``tolerance`` is the loss at which an exact export in float32
    fails, as ``loss`` measures it; what a cut or float16 loses is told and not judged.
    """

    rank: int = 0
    dtype: str = "float32"
    tolerance: float = 1e-5

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "the change as a LoRA, for diffusers, ComfyUI and A1111"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ErasecError(f"lora: option rank is {self.rank}", why="it takes 0, which is exact, or a rank above it")
        if self.dtype not in SIZES:
            raise ErasecError(f"lora: option dtype is {self.dtype!r}", why=nearest(self.dtype, SIZES))
        if not self.tolerance > 0:
            raise ErasecError(f"lora: option tolerance is {self.tolerance}", why="it takes a number above 0")

    def accept(self, sites: Sequence[Site]) -> None:
        fitting(sites)

    def size(self, model: Model) -> int:
        """Bytes of the factors at the most: of the edited sites, or of all where there is no edit yet."""
        total = 0
        for site in edited(model) or model.sites:
            known = sum(delta.rank for delta in model.deltas(site)) or max(site.shape)
            total += sum(site.shape) * min(known, self.rank or known, *site.shape)
        return total * SIZES[self.dtype]

    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        """Write ``out/pytorch_lora_weights.safetensors``, one site in memory at a time, and read all of it back.

        Raises ErasecError where nothing is changed, or something that no LoRA can hold.
        """
        import torch

        refuse(gathered(model.edits), self.holds, self.name)
        dtype = getattr(torch, self.dtype)
        out.mkdir(parents=True, exist_ok=True)
        # A header gives all ranks before the first factor, so the factors wait on disk until the last rank is known.
        with TemporaryDirectory(prefix=".lora-", dir=out) as scratch:
            entries: dict[str, Entry] = {}
            sites = edited(model)
            with bar("factor", len(sites)) as advance:
                for number, site in enumerate(sites):
                    up, down = cut(*factors(model.stored(site), model.deltas(site)), self.rank)
                    if len(down):
                        part = Path(scratch) / f"{number}.safetensors"
                        save(part, named(site, up, down, dtype))
                        entries |= read_header(part)[0]
                    advance(note=site.label)
            if not entries:
                raise ErasecError(
                    "there is no change to write as a LoRA", why=f"{len(model.edits)} edits, which change no weight",
                    fix="name a concept to erase, and an anchor that is not the concept itself",
                )  # fmt: skip
            layout = {key: (each.dtype, each.shape, partial(read_tensor, each)) for key, each in entries.items()}
            stream(out / FILE, layout, MARKS.get(model.family.name))
        judged = self.rank == 0 and self.dtype == "float32"
        return Artifact(self.name, out, (loss(model, out / FILE, self.tolerance if judged else None),))


def edited(model: Model) -> tuple[Site, ...]:
    """The sites that the model's edits change, sorted. Raises ErasecError for one that is no matrix."""
    return fitting({site for edit in model.edits for site in edit.deltas})


def fitting(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites, sorted. Raises ErasecError for one that no LoRA file holds a change of."""
    sites = sorted(sites)
    if strange := [site for site in sites if len(site.shape) != 2 or not site.key.endswith(".weight")]:
        raise ErasecError(
            f"the change of {strange[0].key} cannot be written as a LoRA",
            why=f"its shape is {strange[0].shape}, and LoRA files hold changes of layers' matrices (d_out, d_in) alone",
            fix="train matrices alone, as --pass esd:rank=16 does; or choose a target of whole weights, such as hf",
        )
    for site in sites:
        prefix(site)
    return tuple(sites)


def factors(weight: Tensor, deltas: Iterable[Delta]) -> tuple[Tensor, Tensor]:
    """left (d_out, n) and right (n, d_in), float64, whose product is the change that ``deltas`` make in their order."""
    import torch

    weight = weight.double()
    left, right = weight[:, :0], weight[:0]
    for delta in deltas:
        if isinstance(delta, Remap):
            # (W + L R) D E, without forming the edited weight
            moved = delta.left.double()
            new, reads = weight @ moved + left @ (right @ moved), delta.right.double()
        else:
            new, reads = delta.factors(weight)
        left, right = torch.cat([left, new], 1), torch.cat([right, reads])
    return left, right


def cut(left: Tensor, right: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """up (d_out, r) and down (r, d_in), float64: the matrix of at most that rank nearest to left @ right.

    ``rank`` 0 keeps every singular value above 1e-10 of the largest. Both factors carry the roots of the singular
    values, so that neither leaves the range of float16; each column of ``up`` has its largest entry positive.
    """
    import torch

    (outer, one), (inner, two) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(one @ two.T, full_matrices=False)
    found = int((values > EXACT * values[:1]).sum())
    kept = min(found, rank or found)
    up, down = outer @ u[:, :kept], v[:kept] @ inner.T
    signs = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    roots = values[:kept].sqrt()
    return up * signs * roots, down * signs.T * roots[:, None]


def prefix(site: Site) -> str:
    """What the keys of a site begin with: kohya's names, or diffusers' for transformers. Raises ErasecError."""
    stem = site.key.removesuffix(".weight")
    if site.component == "unet":
        return "lora_unet_" + stem.replace(".", "_")
    if site.component == "transformer":
        return f"transformer.{stem}"
    raise ErasecError(
        f"the change of {site.key} in {site.component} cannot be written as a LoRA",
        why="what reads LoRA files agrees on names in the denoiser alone",
        fix="choose a target that holds whole weights, such as hf",
    )


def named(site: Site, up: Tensor, down: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one site by the file's keys.

    alpha is 1 at every site and the factors carry the root of r instead: where sites differ in alpha, diffusers applies
    the most frequent one to all sites of a UNet. Transformers have no alpha: their product is taken as it is.
    """
    import torch

    start = prefix(site)
    if site.component == "transformer":
        return {f"{start}.lora_A.weight": down.to(dtype), f"{start}.lora_B.weight": up.to(dtype)}
    scale = math.sqrt(len(down))
    return {
        f"{start}.lora_down.weight": (down * scale).to(dtype), f"{start}.lora_up.weight": (up * scale).to(dtype),
        f"{start}.alpha": torch.tensor(1.0, dtype=dtype),
    }  # fmt: skip


def loss(model: Model, file: Path, limit: float | None) -> Check:
    """How far a LoRA file is from the model's edits: Frobenius norm of the difference over that of the change.

    Both are taken over all edited sites, one in memory at a time; the change is the edited weight, in float64, less the
    stored one. A site that the file lacks counts as not changed by it.
    """
    entries = read_header(file)[0]
    lost, whole, bytes_, ranks, worst = 0.0, 0.0, 0, [], (-1.0, "")
    for site in edited(model):
        stored = model.stored(site)
        change = model.weight(site) - stored.double()
        product, rank = _read(entries, prefix(site))
        off, size = float((product - change).norm()), float(change.norm())
        lost, whole = math.hypot(lost, off), math.hypot(whole, size)
        bytes_ += stored.nbytes
        ranks.append(rank)
        if size:
            worst = max(worst, (off / size, site.key))
    value = lost / whole if whole else math.inf
    dtypes = sorted({entry.dtype for key, entry in entries.items() if not key.endswith(".alpha")})
    how = (
        f"Frobenius norm of alpha / r * up @ down - change over that of the change, {len(ranks)} sites read back from "
        f"{file.name}; rank {min(ranks)} to {max(ranks)}, {' '.join(dtypes)}; worst {worst[0]:.2g} at {worst[1]}; "
        f"{file.stat().st_size} bytes, the edited tensors themselves have {bytes_}"
    )
    return Check("lora/loss", value, limit, math.isfinite(value) and (limit is None or value <= limit), how)


def _read(entries: dict[str, Entry], start: str) -> tuple[Tensor | float, int]:
    """alpha / r * up @ down of one site, float64, and r; 0 and 0 where the file does not have it."""
    for one, two in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        if f"{start}.{one}.weight" in entries:
            down, up = (read_tensor(entries[f"{start}.{part}.weight"]).double() for part in (one, two))
            scale = read_tensor(entries[f"{start}.alpha"]).double() / len(down) if one == "lora_down" else 1.0
            return scale * (up @ down), len(down)
    return 0.0, 0
