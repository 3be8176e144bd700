"""Target lora: the changes alone, as low-rank factors that diffusers' load_lora_weights, ComfyUI and A1111 can load.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv:2106.09685: W -> W + alpha / r * up @ down. The change that an edit makes at a site is such a product already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from erasec.base import Artifact, Check, Context, EditTarget
from erasec.checkpoint.safetensors import (
    Entry,
    content_digest,
    read_header,
    read_tensor,
    save_tensors,
    stream_tensors,
)
from erasec.errors import ErasecError
from erasec.model.edit import Remap
from erasec.model.sidecar import check_supported, gather_extras
from erasec.model.threads import LAPACK, fixed_threads
from erasec.options import options
from erasec.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.family import Shape, Site
    from erasec.model.edit import Delta
    from erasec.model.view import Model

# The name of the file that load_lora_weights looks for first in a folder.
FILE = "pytorch_lora_weights.safetensors"
SIZES = {"float32": 4, "float16": 2}
# Singular values below this share of the largest count as zero.
EXACT = 1e-10


@options
class Lora(EditTarget):
    """A LoRA file. ``rank`` 0 writes the exact change of each site; another rank truncates it to its largest singular
    values. ``dtype`` is that of the factors, float32 or float16.

    ``tolerance`` is the largest loss (see ``loss_check``) with which an exact export in float32 passes. The
    loss of a truncated export, or of one in float16, is reported and not enforced.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "float16"] = "float32"
    tolerance: Annotated[float, Field(gt=0)] = 1e-5

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "the change as a LoRA, for diffusers, ComfyUI and A1111"

    def how_to_undo(self) -> str:
        return "loaded on the erased checkpoint with the weight -1, it gives the base back"

    def accept(self, sites: Sequence[Site]) -> None:
        check_lora_sites(sites)

    def size(self, model: Model) -> int:
        """An upper bound of the factors' bytes, for the edited sites; for all sites where there is no edit yet."""
        sites = edited_sites(model) or model.sites
        ranks = []
        for site in sites:
            rank = sum(delta.rank for delta in model.deltas(site)) or max(site.shape)
            ranks.append(min(rank, self.rank or rank, *site.shape))
        numbers = (
            sum(site.shape) * (rank if _has_alpha(site) else max(ranks))
            for site, rank in zip(sites, ranks, strict=True)
        )
        return sum(numbers) * SIZES[self.dtype]

    def export(self, model: Model, out: Path, context: Context) -> Artifact:
        """Write ``out/pytorch_lora_weights.safetensors``, one site in memory at a time, and read all of it back.

        Raises ErasecError where the edits change no weight, or one whose change no LoRA can hold.
        """
        import torch

        check_supported(gather_extras(model.edits), self.extras, self.name)
        dtype = getattr(torch, self.dtype)
        # The file starts with a header that needs all ranks, so the factors are kept on disk until the last is known.
        with TemporaryDirectory(prefix=".lora-", dir=out) as scratch:
            entries: dict[str, Entry] = {}
            sites = edited_sites(model)
            with bar("factor", len(sites)) as advance:
                for number, site in enumerate(sites):
                    up, down = truncate(*factors(model.stored_weight(site), model.deltas(site)), self.rank)
                    if len(down):
                        part = Path(scratch) / f"{number}.safetensors"
                        save_tensors(part, site_tensors(site, up, down, dtype))
                        entries |= read_header(part)[0]
                    advance(note=site.label)
            if not entries:
                raise ErasecError(
                    "there is no change to write as a LoRA",
                    why=f"the model has {len(model.edits)} edits, which change no weight",
                    fix="name a concept to erase, and an anchor that is not the concept itself",
                )
            shapes = {key: entry.shape for key, entry in entries.items()}
            if not _has_alpha(sites[0]):
                shapes = _one_rank(shapes)
            layout = {
                key: (entry.dtype, shapes[key], partial(_padded, entry, shapes[key])) for key, entry in entries.items()
            }
            stream_tensors(out / FILE, layout, model.family.lora)
        exact = self.rank == 0 and self.dtype == "float32"
        return Artifact(self.name, out, (loss_check(model, out / FILE, self.tolerance if exact else None),))

    def compare(self, base: Model, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        """One check, with a limit for an exact LoRA only: one that was truncated or rounded holds other weights."""
        exact = self.rank == 0 and self.dtype == "float32"
        present = Check.files("lora/files", out, [FILE])
        if not present.passed:
            return (present,)
        return present, merged_check(base, checkpoint, out / FILE, self.tolerance if exact else None)


def edited_sites(model: Model) -> tuple[Site, ...]:
    """The sites that the model's edits change, sorted. Raises ErasecError for a change that no LoRA can hold."""
    return check_lora_sites(model.edited_sites)


def check_lora_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites, sorted. Raises ErasecError for a site whose change no LoRA can hold: it is no matrix of a layer, not
    in the denoiser, or one that readers of LoRA files leave out."""
    sites = sorted(sites)
    if others := [site for site in sites if len(site.shape) != 2 or not site.key.endswith(".weight")]:
        raise ErasecError(
            f"the change of {others[0].key} cannot be written as a LoRA",
            why=f"its shape is {others[0].shape}, and LoRA files hold only changes of layers' matrices (d_out, d_in)",
            fix="train only matrices, as --pass esd:rank=16 does; or choose a target of all weights, such as hf",
        )
    if others := [site for site in sites if site.key.startswith("add_embedding.")]:
        raise ErasecError(
            f"the change of {others[0].key} cannot be written as a LoRA",
            why="diffusers loads a LoRA of SDXL without the matrix of the pooled text state, and only warns",
            fix="edit token states alone, as uce:routes=tokens, trce:routes=tokens,rank=16 and esd:rank=16 do; or "
            "choose a target of all weights, such as hf",
        )
    for site in sites:
        key_prefix(site)
    return tuple(sites)


def factors(weight: Tensor, deltas: Iterable[Delta]) -> tuple[Tensor, Tensor]:
    """left (d_out, r) and right (r, d_in), float64: their product is the change of ``weight`` by ``deltas`` in
    order."""
    import torch

    weight = weight.double()
    left, right = weight[:, :0], weight[:0]
    for delta in deltas:
        if isinstance(delta, Remap):
            # (W + L R) D E, without forming the edited weight W + L R
            inner = delta.left.double()
            new_left, new_right = weight @ inner + left @ (right @ inner), delta.right.double()
        else:
            new_left, new_right = delta.factors(weight)
        left, right = torch.cat([left, new_left], 1), torch.cat([right, new_right])
    return left, right


@fixed_threads(LAPACK)
def truncate(left: Tensor, right: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """up (d_out, r) and down (r, d_in), float64: their product is the matrix of rank ``rank`` nearest to left @ right.

    ``rank`` 0 keeps every singular value above 1e-10 of the largest. Both factors are scaled by the roots of the
    singular values, so that neither leaves the range of float16. The largest entry of each column of ``up`` is
    positive.
    """
    import torch

    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    full_rank = int((values > EXACT * values[:1]).sum())
    rank = min(full_rank, rank or full_rank)
    up, down = q_left @ u[:, :rank], vh[:rank] @ q_right.T
    signs = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    roots = values[:rank].sqrt()
    return up * signs * roots, down * signs.T * roots[:, None]


def key_prefix(site: Site) -> str:
    """The start of a site's keys in the file: kohya's names for a UNet, diffusers' for a transformer.

    Raises ErasecError for a site that is not in the denoiser.
    """
    stem = site.key.removesuffix(".weight")
    if site.component == "unet":
        return "lora_unet_" + stem.replace(".", "_")
    if site.component == "transformer":
        return f"transformer.{stem}"
    raise ErasecError(
        f"the change of {site.key} in {site.component} cannot be written as a LoRA",
        why="programs that read LoRA files agree only on names in the denoiser",
        fix="choose a target that writes all weights, such as hf",
    )


def site_tensors(site: Site, up: Tensor, down: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one site, by their keys in the file.

    alpha is 1 at every site, and each factor is multiplied by the root of r instead: where sites differ in alpha,
    diffusers applies the most frequent one to all sites of a UNet. Files for transformers have no alpha: their change
    is the product itself (see ``_one_rank``).
    """
    import torch

    start = key_prefix(site)
    if not _has_alpha(site):
        return {f"{start}.lora_A.weight": down.to(dtype), f"{start}.lora_B.weight": up.to(dtype)}
    scale = math.sqrt(len(down))
    return {
        f"{start}.lora_down.weight": (down * scale).to(dtype),
        f"{start}.lora_up.weight": (up * scale).to(dtype),
        f"{start}.alpha": torch.tensor(1.0, dtype=dtype),
    }


def _has_alpha(site: Site) -> bool:
    """Whether the file states alpha for a site: kohya's files for a UNet do, diffusers' for a transformer do not."""
    return site.component == "unet"


def _one_rank(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of all factors with the largest rank of them, for files without alpha.

    Without alpha, diffusers up to 0.35 takes the rank of the first site as the alpha of all, so that a site of another
    rank would be scaled by their ratio.
    """
    rank = max(shape[0] for key, shape in shapes.items() if ".lora_A." in key)
    return {key: (rank, shape[1]) if ".lora_A." in key else (shape[0], rank) for key, shape in shapes.items()}


def _padded(entry: Entry, shape: Shape) -> Tensor:
    """A tensor, with zeros appended up to ``shape``."""
    tensor = read_tensor(entry)
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded


def loss_check(model: Model, file: Path, limit: float | None) -> Check:
    """How far a LoRA file is from the model's edits: the Frobenius norm of the difference over that of the change.

    Both norms are over all edited sites, of which one is in memory at a time. The change is the edited weight, in
    float64, minus the stored one. A site that is not in the file counts as unchanged by it. With a ``limit`` of None
    the loss is reported and not enforced, as long as it is finite.
    """
    entries = read_header(file)[0]
    lost, whole, stored_bytes, ranks, worst = 0.0, 0.0, 0, [], (-1.0, "")
    for site in edited_sites(model):
        stored = model.stored_weight(site)
        change = model.weight(site) - stored.double()
        product, rank = _read_product(entries, key_prefix(site))
        difference, size = float((product - change).norm()), float(change.norm())
        lost, whole = math.hypot(lost, difference), math.hypot(whole, size)
        stored_bytes += stored.nbytes
        ranks.append(rank)
        if size:
            worst = max(worst, (difference / size, site.key))
    value = lost / whole if whole else math.inf
    dtypes = sorted({entry.dtype for key, entry in entries.items() if not key.endswith(".alpha")})
    how = (
        f"Frobenius norm of alpha / r * up @ down - change over that of the change, {len(ranks)} sites read back from "
        f"{file.name}; rank {min(ranks)} to {max(ranks)}, {' '.join(dtypes)}; worst {worst[0]:.2g} at {worst[1]}; "
        f"{file.stat().st_size} bytes, the edited tensors themselves have {stored_bytes}"
    )
    return Check("lora/loss", value, limit, math.isfinite(value) and (limit is None or value <= limit), how)


def merged_check(base: Model, checkpoint: Folder, file: Path, limit: float | None) -> Check:
    """How far ``base`` with a LoRA file is from ``checkpoint``: the largest error of any number in the denoiser, beyond
    the rounding to the dtype of the checkpoint, over the largest change of its tensor.

    It is infinite where a number is not finite, where another component changed, which no LoRA of erasec can hold, and
    where the file has a tensor that no factor of a site is: readers may add it as a change of another kind.
    """
    from torch import finfo

    entries, worst = read_header(file)[0], (0.0, "")
    component = base.family.denoiser
    stored, unread = checkpoint.entries(component), {*entries}
    for other in (name for name in base.family.components if name != component):
        if content_digest(base.entries(other)) != content_digest(checkpoint.entries(other)):
            worst = math.inf, f"in {other}"
    for site in (site for site in base.parameters if site.component == component):
        before, after = base.stored_weight(site), read_tensor(stored[site.key])
        product: Tensor | float = 0.0
        if len(site.shape) == 2 and site.key.endswith(".weight"):
            product, _ = _read_product(entries, key_prefix(site))
            unread -= _factor_names(entries, key_prefix(site))
        wanted, change = before.double() + product, float((after.double() - before.double()).abs().max())
        # Half a spacing of the dtype is at most half its eps times the number.
        rounding = finfo(after.dtype).eps / 2 * wanted.abs() + finfo(after.dtype).tiny
        error = float(((after.double() - wanted).abs() - rounding).clamp_min(0).max())
        share = error / change if change else math.inf if error else 0.0
        worst = max(worst, (share if math.isfinite(share) else math.inf, site.key))
    if unread:
        worst = math.inf, f"{min(unread)}, which is no factor of a tensor of the base"
    how = "largest error of the base with this LoRA against the checkpoint, beyond rounding, over the largest change of"
    return Check.at_most("lora/merged", worst[0], limit, f"{how} the tensor; the worst is {worst[1] or 'none'}")


def _factor_names(entries: Mapping[str, Entry], start: str) -> set[str]:
    """The names of the tensors that ``_read_product`` reads for one site."""
    for names in (("lora_down.weight", "lora_up.weight", "alpha"), ("lora_A.weight", "lora_B.weight")):
        if f"{start}.{names[0]}" in entries:
            return {f"{start}.{name}" for name in names}
    return set()


def _read_product(entries: dict[str, Entry], start: str) -> tuple[Tensor | float, int]:
    """alpha / r * up @ down of one site, float64, and r; 0 and 0 where the site is not in the file."""
    for down_name, up_name in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        if f"{start}.{down_name}.weight" in entries:
            down, up = (read_tensor(entries[f"{start}.{name}.weight"]).double() for name in (down_name, up_name))
            scale = read_tensor(entries[f"{start}.alpha"]).double() / len(down) if down_name == "lora_down" else 1.0
            return scale * (up @ down), len(down)
    return 0.0, 0
