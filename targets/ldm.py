"""Target ldm: one file in the original Stable Diffusion layout, which ComfyUI, A1111 and from_single_file read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target, finite
from erasec.checkpoint.safetensors import Entry, read_header, read_tensor, stream
from erasec.errors import ErasecError
from erasec.family import detect
from erasec.ldm.tensor_names import PREFIXES, UNUSED_IN_FOLDERS, Place, canonical, detect_single, from_single, to_single
from erasec.model.sidecar import read, refuse
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model
    from erasec.progress import Advance

FILE = "model.safetensors"
# The names of the ModelSpec metadata standard, by family and prediction
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1", ("sd1", "v"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512", ("sd2", "v"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base", ("sdxl", "v"): "stable-diffusion-xl-v1-base",
}  # fmt: skip
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class Ldm(Target):
    """Renames the merged checkpoint's tensors into one safetensors file; every number and dtype is kept.

    A single file has no place for the tokenizer and the sampler's settings: its readers know them by family.
    """

    name: ClassVar[str] = "ldm"
    summary: ClassVar[str] = "a single file in the original layout, for ComfyUI, A1111 and from_single_file"

    def size(self, model: Model) -> int:
        """The size of the weights as they are stored. Raises ErasecError where the model has no single-file layout."""
        family = model.family.name
        if family not in PREFIXES:
            raise _not_single(str(model.source.root))
        entries = {component: model.entries(component) for component in PREFIXES[family]}
        pieces(family, entries)
        metadata(model.source, family)
        return sum(entry.stop - entry.start for own in entries.values() for entry in own.values())

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write ``out/model.safetensors``, one tensor in memory at a time, and read all of it back."""
        import torch

        refuse(read(checkpoint.root), self.holds, self.name)
        if "unet" not in checkpoint.index:
            raise _not_single(str(checkpoint.root))
        family = detect({key: entry.shape for key, entry in checkpoint.entries("unet").items()}).name
        entries = {component: checkpoint.entries(component) for component in PREFIXES[family]}
        parts = pieces(family, entries)
        about, marks = metadata(checkpoint, family)
        empty = {mark: ("F32", (0,), partial(torch.zeros, 0)) for mark in marks}
        with bar("write", len(parts)) as advance:
            tensors = {
                key: (own[0][1].dtype, own[0][0].shape, partial(_joined, own, advance)) for key, own in parts.items()
            }
            stream(out / FILE, {**tensors, **empty}, about)
        return Artifact(
            self.name, out, (finite("ldm/finite", read_header(out / FILE)[0]), same_tensors(entries, out / FILE))
        )


def pieces(family: str, entries: Mapping[str, Mapping[str, Entry]]) -> dict[str, list[tuple[Place, Entry]]]:
    """The folder's tensors, {component: {key: entry}}, by the single file's key that each is the whole or a part of.

    Raises ErasecError where a tensor has no place in a single file, or the parts of one are of several dtypes.
    """
    shapes = {component: {key: entry.shape for key, entry in own.items()} for component, own in entries.items()}
    found: dict[str, list[tuple[Place, Entry]]] = {}
    for (component, key), place in to_single(family, shapes).items():
        found.setdefault(place.key, []).append((place, entries[component][key]))
    for key, parts in found.items():
        if len(dtypes := sorted({entry.dtype for _, entry in parts})) > 1:
            raise ErasecError(
                f"the parts of {key} have the dtypes {' and '.join(dtypes)}",
                why="a single file holds q, k and v as one", fix="save the text encoder in one dtype",
            )  # fmt: skip
    return found


def _not_single(where: str) -> ErasecError:
    return ErasecError(
        "this model has no UNet", why=f"single files are written for {', '.join(PREFIXES)}, which have one",
        where=where, fix="take the target hf, which writes every model's folder",
    )  # fmt: skip


def metadata(checkpoint: Folder, family: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The file's metadata, and the keys of the empty tensors by which readers know an SDXL that predicts v.

    Raises ErasecError where the checkpoint does not say what it predicts, or single files cannot say it.
    """
    if not (checkpoint.root / "scheduler" / "scheduler_config.json").is_file():
        raise ErasecError(
            "the checkpoint has no scheduler/scheduler_config.json", where=str(checkpoint.root),
            why="it says what the UNet predicts, and the file must say so too",
        )  # fmt: skip
    config = checkpoint.config("scheduler", "scheduler_config.json")
    predicted = config.get("prediction_type", "epsilon")
    if predicted not in PREDICTIONS:
        raise ErasecError(
            f"the UNet predicts {predicted!r}", why=f"single files are read as {' or '.join(PREDICTIONS)}",
        )  # fmt: skip
    prediction = PREDICTIONS[predicted]
    about = {
        "format": "pt",
        "modelspec.architecture": ARCHITECTURES[family, prediction],
        "modelspec.prediction_type": prediction,
    }
    if (family, prediction) != ("sdxl", "v"):
        return about, ()
    return about, ("v_pred", "ztsnr") if config.get("rescale_betas_zero_snr") else ("v_pred",)


def same_tensors(folder: Mapping[str, Mapping[str, Entry]], file: Path) -> Check:
    """Count what differs between a folder's tensors, {component: {key: entry}}, and those a single file holds.

    A tensor is the same where key, dtype, shape and every byte are; what single files leave out is not counted.
    """
    entries = read_header(file)[0]
    shapes = {key: entry.shape for key, entry in entries.items()}
    found = from_single(detect_single(shapes), shapes)
    wanted = {
        (component, canonical(component, key)): entry
        for component, own in folder.items()
        for key, entry in own.items()
        if canonical(component, key) not in UNUSED_IN_FOLDERS
    }
    different = set(wanted) ^ set(found)
    for name in set(wanted) & set(found):
        if not _equal(wanted[name], entries[found[name].key], found[name]):
            different.add(name)
    how = f"tensors by key, dtype, shape and every byte; {len(wanted)} of the checkpoint, {len(found)} of the file"
    if different:
        how += f"; the first that differs is {' '.join(min(different))}"
    return Check("ldm/layout", float(len(different)), 0.0, not different, how)


def _equal(wanted: Entry, stored: Entry, place: Place) -> bool:
    import torch

    if (stored.dtype, place.folder_shape) != (wanted.dtype, wanted.shape):
        return False
    # Rows lie together, so a third of a tensor is read alone.
    rows = place.rows or place.shape[0]
    row = (stored.stop - stored.start) // place.shape[0]
    start = stored.start + place.start * row
    part = read_tensor(replace(stored, shape=(rows, *place.shape[1:]), start=start, stop=start + rows * row))
    part = part.T if place.transposed else part
    # Compared as bytes, so that a NaN is equal to itself.
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (part, read_tensor(wanted))))


def _joined(parts: list[tuple[Place, Entry]], advance: Advance) -> Tensor:
    """The single file's tensor, from its parts along dimension 0."""
    import torch

    advance()
    ordered = sorted(parts, key=lambda part: part[0].start)
    found = [read_tensor(entry).T if place.transposed else read_tensor(entry) for place, entry in ordered]
    return torch.cat(found).reshape(parts[0][0].shape)
