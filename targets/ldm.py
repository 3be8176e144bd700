"""Target ldm: one file in the original Stable Diffusion layout, for ComfyUI, A1111 and from_single_file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.safetensors import Entry, finite_check, read_header, read_tensor, stream_tensors
from erasec.errors import ErasecError
from erasec.family import detect
from erasec.ldm.tensor_names import (
    LAYOUTS,
    UNUSED_IN_FOLDERS,
    TensorLocation,
    canonical,
    detect_single,
    from_single,
    layout,
    to_single,
)
from erasec.model.sidecar import check_supported, read_extras
from erasec.options import options
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model
    from erasec.progress import Advance

FILE = "model.safetensors"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@options
class Ldm(Target):
    """Writes the merged checkpoint's tensors under their original names into one safetensors file, in their dtypes.

    A single file contains neither the tokenizer nor the scheduler's settings: its readers have them for each family.
    """

    name: ClassVar[str] = "ldm"
    summary: ClassVar[str] = "a single file in the original layout, for ComfyUI, A1111 and from_single_file"

    def size(self, model: Model) -> int:
        """Bytes of the weights as stored. Raises ErasecError if the model cannot be written as a single file."""
        family = model.family.name
        if family not in LAYOUTS:
            raise _no_unet(str(model.source.root))
        entries = {component: model.entries(component) for component in LAYOUTS[family].prefixes}
        pieces(family, entries)
        metadata(model.source, family)
        return sum(entry.stop - entry.start for own in entries.values() for entry in own.values())

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write ``out/model.safetensors`` with one tensor in memory at a time, and compare it with the checkpoint."""
        import torch

        check_supported(read_extras(checkpoint.root), self.extras, self.name)
        if "unet" not in checkpoint.index:
            raise _no_unet(str(checkpoint.root))
        family = detect({key: entry.shape for key, entry in checkpoint.entries("unet").items()}).name
        entries = {component: checkpoint.entries(component) for component in layout(family).prefixes}
        parts = pieces(family, entries)
        file_metadata, marks = metadata(checkpoint, family)
        empty = {mark: ("F32", (0,), partial(torch.zeros, 0)) for mark in marks}
        with bar("write", len(parts)) as advance:
            tensors = {
                key: (own[0][1].dtype, own[0][0].shape, partial(_concatenate, own, advance))
                for key, own in parts.items()
            }
            stream_tensors(out / FILE, {**tensors, **empty}, file_metadata)
        return Artifact(
            self.name, out, (finite_check("ldm/finite", read_header(out / FILE)[0]), same_tensors(entries, out / FILE))
        )


def pieces(family: str, entries: Mapping[str, Mapping[str, Entry]]) -> dict[str, list[tuple[TensorLocation, Entry]]]:
    """Group a folder's tensors by the tensor of the single file that they become, alone or as parts of it.

    ``entries`` is {component: {tensor name: entry}}. Raises ErasecError for a tensor that has no place in a single
    file, and for parts of one tensor that have different dtypes.
    """
    shapes = {component: {key: entry.shape for key, entry in own.items()} for component, own in entries.items()}
    groups: dict[str, list[tuple[TensorLocation, Entry]]] = {}
    for (component, key), place in to_single(family, shapes).items():
        groups.setdefault(place.key, []).append((place, entries[component][key]))
    for key, parts in groups.items():
        if len(dtypes := sorted({entry.dtype for _, entry in parts})) > 1:
            raise ErasecError(
                f"the parts of {key} have the dtypes {' and '.join(dtypes)}",
                why="a single file stores q, k and v as one tensor",
                fix="save the text encoder in one dtype",
            )
    return groups


def _no_unet(where: str) -> ErasecError:
    return ErasecError(
        "this model has no UNet",
        why=f"single files can be written for {', '.join(LAYOUTS)} only, whose denoiser is a UNet",
        where=where,
        fix="use the target hf, which writes a diffusers folder of any model",
    )


def metadata(checkpoint: Folder, family: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The file's metadata, and the names of the empty tensors that mark an SDXL model with v-prediction.

    Raises ErasecError if the checkpoint does not state what its UNet predicts, or if single files cannot state it.
    """
    if not (checkpoint.root / "scheduler" / "scheduler_config.json").is_file():
        raise ErasecError(
            "the checkpoint has no scheduler/scheduler_config.json",
            where=str(checkpoint.root),
            why="it states what the UNet predicts, which the single file must state too",
            fix="add the scheduler folder of the model",
        )
    config = checkpoint.config("scheduler", "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ErasecError(
            f"the UNet predicts {prediction!r}",
            why=f"readers of single files support {' and '.join(PREDICTIONS)} only",
            fix="use the target hf, which keeps the scheduler's settings",
        )
    own = layout(family)
    file_metadata = {
        "format": "pt",
        "modelspec.architecture": own.architecture[prediction],
        "modelspec.prediction_type": PREDICTIONS[prediction],
    }
    if prediction != "v_prediction" or not own.v_prediction_mark:
        return file_metadata, ()
    zero_snr = (own.zero_snr_mark,) if config.get("rescale_betas_zero_snr") else ()
    return file_metadata, (own.v_prediction_mark, *zero_snr)


def same_tensors(folder: Mapping[str, Mapping[str, Entry]], file: Path) -> Check:
    """A check that counts the tensors that differ between a folder and a single file in name, dtype, shape or bytes.

    ``folder`` is {component: {tensor name: entry}}. Tensors that single files leave out are not counted.
    """
    entries = read_header(file)[0]
    shapes = {key: entry.shape for key, entry in entries.items()}
    places = from_single(detect_single(shapes), shapes)
    wanted = {
        (component, canonical(component, key)): entry
        for component, own in folder.items()
        for key, entry in own.items()
        if canonical(component, key) not in UNUSED_IN_FOLDERS
    }
    different = set(wanted) ^ set(places)
    for name in set(wanted) & set(places):
        if not _equal(wanted[name], entries[places[name].key], places[name]):
            different.add(name)
    totals = f"{len(wanted)} of the checkpoint, {len(places)} of the file"
    how = f"tensors that differ in name, dtype, shape or bytes; {totals}"
    return Check.count("ldm/layout", [" ".join(name) for name in sorted(different)], how)


def _equal(wanted: Entry, stored: Entry, place: TensorLocation) -> bool:
    """Whether the tensor at ``place`` in the file's tensor ``stored`` equals the folder's tensor ``wanted``."""
    import torch

    if (stored.dtype, place.folder_shape) != (wanted.dtype, wanted.shape):
        return False
    # Rows are contiguous, so that one third of a tensor can be read alone.
    rows = place.rows or place.shape[0]
    row_bytes = (stored.stop - stored.start) // place.shape[0]
    start = stored.start + place.start * row_bytes
    part = read_tensor(replace(stored, shape=(rows, *place.shape[1:]), start=start, stop=start + rows * row_bytes))
    part = part.T if place.transposed else part
    # Compare bytes: a NaN must be equal to itself.
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (part, read_tensor(wanted))))


def _concatenate(parts: list[tuple[TensorLocation, Entry]], advance: Advance) -> Tensor:
    """The single file's tensor: its parts concatenated along dimension 0, in their order."""
    import torch

    advance()
    ordered = sorted(parts, key=lambda part: part[0].start)
    tensors = [read_tensor(entry).T if place.transposed else read_tensor(entry) for place, entry in ordered]
    return torch.cat(tensors).reshape(parts[0][0].shape)
