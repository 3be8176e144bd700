"""Target ldm: one file in the original layout of the family, for ComfyUI, A1111 and from_single_file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from erasec.base import Artifact, Check, Context, Target
from erasec.checkpoint.folder import downscale
from erasec.checkpoint.safetensors import Entry, finite_check, read_header, read_tensor, stream_tensors, tensor_bytes
from erasec.errors import ErasecError
from erasec.family import FAMILIES, Family
from erasec.graphs.parity import TOLERANCES, relative_error
from erasec.ldm.configs import POSITIONS, config_files, sizes_from_shapes
from erasec.ldm.joint_readers import check_joint_readers, reader_check, reads_width
from erasec.ldm.readers import check_readers, compare_configs, compare_schedulers, needs_configs
from erasec.ldm.single_file import SingleFile, entry_at, stored_form
from erasec.ldm.tensor_names import (
    LAYOUTS,
    TensorLocation,
    from_single,
    layout,
    stored_names,
    to_single,
)
from erasec.model.loading import family_of
from erasec.model.networks import fill
from erasec.model.sidecar import check_supported, read_extras
from erasec.options import options
from erasec.progress import bar, disable_library_bars, without_library_warnings

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.model.view import Model
    from erasec.progress import Advance

FILE, DENOISER_FILE = "model.safetensors", "transformer.safetensors"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@options
class Ldm(Target):
    """Writes the merged checkpoint's tensors under their original names into one safetensors file, in their dtypes.

    A single file contains neither configs nor the tokenizer: its readers have them for each family. A checkpoint whose
    own ones make other pictures is refused (``ldm.readers``).

    ``parts`` "denoiser" writes the transformer alone, without a prefix, as ComfyUI loads diffusion models.
    """

    parts: Literal["all", "denoiser"] = "all"

    name: ClassVar[str] = "ldm"
    summary: ClassVar[str] = "a single file in the original layout, for ComfyUI, A1111 and from_single_file"

    def size(self, model: Model) -> int:
        """Bytes of the weights as stored. Raises ErasecError if the model cannot be written as a single file."""
        family = model.family
        if family.name not in LAYOUTS:
            raise _no_layout(str(model.source.root))
        entries = {component: model.entries(component) for component in self._components(family)}
        parts = pieces(family.name, entries)
        lost_settings(model.source, family.name, entries)
        return sum(entry.stop - entry.start for own in parts.values() for _, entry in own)

    def notes(self, model: Model) -> tuple[str, ...]:
        entries = {component: model.entries(component) for component in self._components(model.family)}
        return lost_settings(model.source, model.family.name, entries)

    def _components(self, family: Family) -> tuple[str, ...]:
        """The components of a model of ``family`` that the file holds."""
        if self.parts == "all":
            return family.components
        if not LAYOUTS[family.name].modules:
            raise ErasecError(
                f"ldm:parts=denoiser writes a transformer, and {family.title} has a {family.denoiser}",
                why="readers of its single files expect all components",
                fix="leave out parts=denoiser",
            )
        return (family.denoiser,)

    def export(self, checkpoint: Folder, out: Path, context: Context) -> Artifact:
        """Write ``out/model.safetensors``, or of the transformer alone ``out/transformer.safetensors``, with one tensor
        in memory at a time, and compare it with the checkpoint."""
        import torch

        check_supported(read_extras(checkpoint.root), self.extras, self.name)
        family = _family(checkpoint)
        file = self._file(out)
        entries = {component: checkpoint.entries(component) for component in self._components(family)}
        parts = pieces(family.name, entries)
        lost_settings(checkpoint, family.name, entries)
        file_metadata, marks = metadata(checkpoint, family.name)
        empty = {mark: ("F32", (0,), partial(torch.zeros, 0)) for mark in marks}
        prefix = self._prefix(family)
        with bar("write", len(parts)) as advance:
            tensors = {
                key.removeprefix(prefix): (own[0][1].dtype, own[0][0].shape, partial(_concatenate, own, advance))
                for key, own in parts.items()
            }
            stream_tensors(file, {**tensors, **empty}, file_metadata)
        checks = finite_check("ldm/finite", read_header(file)[0]), same_tensors(family.name, entries, file)
        if not all(check.passed for check in checks):
            return Artifact(self.name, out, checks)
        if layout(family.name).modules:
            return Artifact(self.name, out, (*checks, *_joint_checks(family.name, entries[family.denoiser], file)))
        with without_library_warnings():
            return Artifact(self.name, out, (*checks, *read_back(checkpoint, family.name, file, context.seed)))

    def compare(self, checkpoint: Folder, out: Path) -> tuple[Check, ...]:
        family = _family(checkpoint)
        entries = {component: checkpoint.entries(component) for component in self._components(family)}
        file, prefix = self._file(out), self._prefix(family)
        present = Check.files("ldm/files", out, [file.name])
        if not present.passed:
            return (present,)
        keys = {key.removeprefix(prefix) for key in pieces(family.name, entries)} | {
            *metadata(checkpoint, family.name)[1]
        }
        how = f"tensors that only one of {file.name} and the merged checkpoint has"
        names = Check.count("ldm/names", sorted(keys ^ read_header(file)[0].keys()), how)
        if not names.passed:
            return present, names
        return present, names, same_tensors(family.name, entries, file)

    def _prefix(self, family: Family) -> str:
        """What the names of single files begin with, and those in the file of the target do not."""
        return layout(family.name).prefixes[family.denoiser] if self.parts == "denoiser" else ""

    def _file(self, out: Path) -> Path:
        """The file that the target writes into ``out``."""
        return out / (FILE if self.parts == "all" else DENOISER_FILE)


def _family(checkpoint: Folder) -> Family:
    """The family of a folder. Raises ErasecError for a folder whose denoiser has no single-file layout."""
    if not checkpoint.index.keys() & {"unet", "transformer"}:
        raise _no_layout(str(checkpoint.root))
    family = family_of(checkpoint)
    if family.name not in LAYOUTS:
        raise _no_layout(str(checkpoint.root))
    return family


def _joint_checks(family: str, transformer: Mapping[str, Entry], file: Path) -> Iterator[Check]:
    """The check of how diffusers reads the transformer of a file, where it reads one of this width."""
    if reads_width(family, {key: entry.shape for key, entry in transformer.items()}):
        shapes = {key: entry.shape for key, entry in read_header(file)[0].items()}
        yield reader_check(family, shapes, from_single(family, shapes))


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
                why="a single file stores q, k and v of a layer as one tensor",
                fix="save the component in one dtype",
            )
    return groups


def _no_layout(where: str) -> ErasecError:
    return ErasecError(
        "this model has no denoiser that single files hold",
        why=f"single files can be written for {', '.join(LAYOUTS)}",
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
            why="it states what the denoiser predicts, and at which noise",
            fix="add the scheduler folder of the model",
        )
    if FAMILIES[family].flow:
        return {"format": "pt"}, ()
    config = checkpoint.config("scheduler", "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    own = layout(family)
    if prediction not in own.architecture:
        raise ErasecError(
            f"the UNet predicts {prediction!r}",
            why=f"readers of single files of {family} support {' and '.join(own.architecture)} only",
            fix="use the target hf, which keeps the scheduler's settings",
        )
    file_metadata = {
        "format": "pt",
        "modelspec.architecture": own.architecture[prediction],
        "modelspec.prediction_type": PREDICTIONS[prediction],
    }
    if prediction != "v_prediction" or not own.v_prediction_mark:
        return file_metadata, ()
    zero_snr = (own.zero_snr_mark,) if config.get("rescale_betas_zero_snr") else ()
    return file_metadata, (own.v_prediction_mark, *zero_snr)


def lost_settings(checkpoint: Folder, family: str, entries: Mapping[str, Mapping[str, Entry]]) -> tuple[str, ...]:
    """Sentences about settings that readers do not get from the single file, which will hold the tensors ``entries``.

    Raises ErasecError if they would make other pictures with it.
    """
    _, marks = metadata(checkpoint, family)
    if layout(family).modules:
        return check_joint_readers(checkpoint, family, entries)
    prediction = checkpoint.config("scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
    rescaled = layout(family).zero_snr_mark in marks
    shapes = {name: {key: entry.shape for key, entry in own.items()} for name, own in entries.items()}
    return check_readers(checkpoint, family, shapes, prediction, rescaled)


def read_back(checkpoint: Folder, family: str, file: Path, seed: int = 0) -> tuple[Check, ...]:
    """Two checks of what diffusers' from_single_file makes of a file: its configs, and one output of its UNet.

    The loader is given the configs that readers have for the family, so it needs no network; for a model that they have
    no configs for, those of the checkpoint. One UNet at a time is in memory, in bfloat16: it has the range of float32,
    and both UNets are rounded alike.
    """
    import diffusers
    import torch

    disable_library_bars()
    sizes, dtype = sizes_from_shapes(family, _shapes(checkpoint, family)), torch.bfloat16
    configs = checkpoint if needs_configs(checkpoint, family, sizes) else SingleFile(file)
    kind = getattr(diffusers, config_files(family, sizes)["model_index.json"]["_class_name"])
    options: dict[str, Any] = {"config": str(configs.root), "local_files_only": True, "torch_dtype": dtype}
    prefix = layout(family).prefixes["unet"]
    entries = {key: entry for key, entry in read_header(file)[0].items() if key.startswith(prefix)}
    # The loader maps a file into memory, which can be much larger than the rounded UNet.
    tensors = {key: read_tensor(entry).to(dtype) for key, entry in entries.items()}
    unet = diffusers.UNet2DConditionModel.from_single_file(tensors, subfolder="unet", **options)
    del tensors
    read = unet_output(unet, seed)
    faults = list(_faults(checkpoint, family, kind.from_single_file(file, unet=unet, **options)))
    del unet
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(checkpoint.config("unet"))
    fill(unet, "unet", checkpoint.entries("unet"), {}, checkpoint.root, dtype)
    own = unet_output(unet.eval(), seed)
    source = "the checkpoint" if configs is checkpoint else "the family's published model"
    reader = f"read by diffusers' {kind.__name__}.from_single_file with the configs of {source}"
    how = f"max |file - checkpoint| / max |checkpoint| of the UNet's output in bfloat16, seed {seed}; {reader}"
    return (
        Check.count("ldm/configs", faults, f"settings that change pictures and differ from the checkpoint's; {reader}"),
        Check.at_most("ldm/unet", relative_error(read.numpy(), own.numpy()), TOLERANCES["fp16"], how),
    )


def _faults(checkpoint: Folder, family: str, pipe: Any) -> Iterator[str]:
    """What a pipeline that was read from a single file has otherwise than its checkpoint: settings, missing tensors."""
    for name in layout(family).prefixes:
        network = getattr(pipe, name)
        read = network.config.to_dict() if hasattr(network.config, "to_dict") else network.config
        yield from (str(found) for found in compare_configs(name, checkpoint.config(name), read) if found.pictures)
        yield from (f"{name} has no {key}" for key, tensor in network.state_dict().items() if tensor.is_meta)
    own = checkpoint.config("scheduler", "scheduler_config.json")
    yield from (str(found) for found in compare_schedulers(own, pipe.scheduler.config) if found.pictures)


def unet_output(unet: Any, seed: int) -> Tensor:
    """A UNet's prediction (1, channels, height, width) in float32, for seeded latents of its smallest size."""
    import torch

    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    side, more = downscale(config), {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        size = 8.0 * side
        more = {"text_embeds": draw(1, pooled), "time_ids": torch.tensor([[size, size, 0, 0, size, size]])}
    latents, states = draw(1, config.in_channels, side, side), draw(1, POSITIONS, config.cross_attention_dim)
    with torch.no_grad():
        output: Tensor = unet(latents, 500, states, added_cond_kwargs=more or None).sample
    return output.float()


def _shapes(checkpoint: Folder, family: str) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        component: {key: entry.shape for key, entry in checkpoint.entries(component).items()}
        for component in layout(family).prefixes
    }


def same_tensors(family: str, folder: Mapping[str, Mapping[str, Entry]], file: Path) -> Check:
    """A check that counts the tensors that differ between a folder and a single file in name, dtype, shape or bytes.

    ``folder`` is {component: {tensor name: entry}}. Tensors that single files leave out are not counted.
    """
    entries = read_header(file)[0]
    places = from_single(family, {key: entry.shape for key, entry in entries.items()})
    wanted: dict[tuple[str, str], Entry] = {}
    for component, own in folder.items():
        names = stored_names(family, component, own)
        wanted |= {(component, name): own[key] for key, name in names.items()}
    different = set(wanted) ^ set(places)
    for name in set(wanted) & set(places):
        if not _equal(wanted[name], entries[places[name].key], places[name]):
            different.add(name)
    totals = f"{len(wanted)} of the checkpoint, {len(places)} of the file"
    how = f"tensors that differ in name, dtype, shape or bytes; {totals}"
    return Check.count("ldm/layout", [" ".join(name) for name in sorted(different)], how)


def _equal(wanted: Entry, stored: Entry, place: TensorLocation) -> bool:
    """Whether the tensor at ``place`` in the file's tensor ``stored`` equals the folder's tensor ``wanted``."""
    if (stored.dtype, place.folder_shape) != (wanted.dtype, wanted.shape):
        return False
    # The part is read as ``SingleFile`` reads it, and not turned into the form in which it was written. Bytes are
    # compared: a NaN must be equal to itself.
    return tensor_bytes(read_tensor(entry_at(stored, place))) == tensor_bytes(read_tensor(wanted))


def _concatenate(parts: list[tuple[TensorLocation, Entry]], advance: Advance) -> Tensor:
    """The single file's tensor: its parts concatenated along dimension 0, in their order."""
    import torch

    advance()
    ordered = sorted(parts, key=lambda part: part[0].start)
    tensors = [stored_form(place, read_tensor(entry)) for place, entry in ordered]
    return torch.cat(tensors)
