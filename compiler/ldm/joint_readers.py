"""What readers of a single file of a transformer rebuild, compared with the folder that the file is written from.

As in ``ldm.readers``, but diffusers is not given the file: its transformer may take as much memory as the machine has.
Instead, diffusers' own map of names is given the numbers of the rows of each tensor, and shows where it puts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from erasec.base import Check
from erasec.checkpoint.safetensors import Entry, read_tensor
from erasec.errors import ErasecError, reason
from erasec.family import FAMILIES
from erasec.ldm import joint_configs
from erasec.ldm.configs import Shapes, size, text_config
from erasec.ldm.readers import (
    METADATA,
    TEXT,
    VAE,
    Difference,
    clip_differences,
    compare_fields,
    extends_clip,
    lost_metadata,
    only_with_configs,
    refuse_differences,
    without_published_sizes,
)
from erasec.ldm.tensor_names import PROJECTION, TensorLocation, canonical, layout

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.checkpoint.folder import Folder
    from erasec.family import Shape

# As in ``ldm.readers``: fields that change what a network computes, with the values of the libraries' classes.
TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": None,
    "axes_dims_rope": (16, 56, 56),
    "dual_attention_layers": (),
    "guidance_embeds": False,
    "in_channels": None,
    "joint_attention_dim": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_single_layers": None,
    "out_channels": None,
    "patch_size": None,
    "pooled_projection_dim": None,
    "pos_embed_max_size": None,
    "qk_norm": None,
}
T5: dict[str, Any] = {
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
    "vocab_size": 32128,
}
PUBLISHED_T5 = {**T5, "feed_forward_proj": "gated-gelu"}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
# diffusers reads FLUX at this width alone.
FLUX_WIDTH = 3072


def check_joint_readers(folder: Folder, family: str, entries: Mapping[str, Mapping[str, Entry]]) -> tuple[str, ...]:
    """Sentences about what the readers of a single file do not get from it, for the tensors of a ``folder``.

    ``entries`` is {component: {tensor name: entry}}. Raises ErasecError if the readers would rebuild a model that makes
    other pictures, or none.
    """
    shapes = {name: {key: entry.shape for key, entry in own.items()} for name, own in entries.items()}
    title = FAMILIES[family].title
    _check_projections(family, entries)
    published = joint_configs.published(family, shapes)
    if not published and not extends_clip(folder):
        return (only_with_configs(title),)
    whole = len(entries) > 1
    differing = list(_differences(folder, family, shapes))
    differing += _other_differences(folder, family, shapes) if whole else ()
    refuse_differences(differing, title, folder.root)
    notes = [] if published else [without_published_sizes(title)]
    if differing:
        notes.append(lost_metadata(differing))
    if not whole:
        notes.append(
            f"ldm: the file holds the transformer of {title} alone; its readers need the text encoders and the VAE as "
            "files of their own."
        )
    return tuple(notes)


def _check_projections(family: str, entries: Mapping[str, Mapping[str, Entry]]) -> None:
    """Raise ErasecError for a projection that readers replace by the identity, and that is another matrix."""
    import torch

    for component in layout(family).unprojected:
        for key, entry in entries.get(component, {}).items():
            if canonical(component, key) != PROJECTION:
                continue
            projection = read_tensor(entry)
            if not torch.equal(projection, torch.eye(*entry.shape, dtype=projection.dtype)):
                raise ErasecError(
                    f"a single file would not be this model: {component} has a {key} that is not the identity",
                    why=f"readers of single files of {FAMILIES[family].title} pool the states of this encoder without "
                    "a projection, as the published model does",
                    fix="use the target hf, which keeps the projection",
                )


def _differences(folder: Folder, family: str, shapes: Shapes) -> Iterator[Difference]:
    """The settings of transformer and scheduler in which a ``folder`` differs from what readers of a file rebuild."""
    read = joint_configs.transformer_config(family, shapes["transformer"])
    yield from compare_fields("transformer", folder.config("transformer"), read, TRANSFORMER)
    read = joint_configs.scheduler_config(family, shapes["transformer"])
    yield from compare_fields("scheduler", folder.config("scheduler", "scheduler_config.json"), read, SCHEDULER)


def _other_differences(folder: Folder, family: str, shapes: Shapes) -> Iterator[Difference]:
    """The settings of text encoders, tokenizers and VAE in which a ``folder`` differs from what readers rebuild."""
    own = joint_configs.layout(family)
    for (name, text), activation in zip(joint_configs.clip_sizes(family, shapes).items(), own.activations, strict=True):
        config = {**folder.config(name), "vocab_size": text.vocabulary, "max_position_embeddings": text.positions}
        yield from compare_fields(name, config, text_config(text, activation), TEXT)
    for name in layout(family).t5:
        if name in shapes:
            yield from compare_fields(name, folder.config(name), PUBLISHED_T5, T5)
    read = joint_configs.vae_config_of(family, shapes["vae"])
    yield from compare_fields("vae", folder.config("vae"), read, VAE, METADATA["vae"])
    yield from clip_differences(folder, own.pad_tokens)


def reader_check(family: str, file: Mapping[str, Shape], places: Mapping[tuple[str, str], TensorLocation]) -> Check:
    """A check that counts the tensors of the transformer that diffusers takes from other rows of a file than erasec.

    ``file`` are the shapes of the file's tensors by name, ``places`` the places of the folder's tensors there. Each
    tensor is represented by the numbers of its rows, one column wide, so that no weight is read.
    """
    component, kind = FAMILIES[family].denoiser, FAMILIES[family].denoiser_class
    wanted = {key: place for (owner, key), place in places.items() if owner == component}
    numbers = _row_numbers({place.key: file[place.key] for place in wanted.values()})
    how = f"tensors of the transformer that diffusers' {kind}.from_single_file takes from other rows of the file"
    try:
        read = _converter(family)(dict(numbers))
    except (KeyError, RuntimeError, ValueError) as error:  # a tensor is missing or has another size
        return Check.count("ldm/reader", [f"diffusers does not read the file: {reason(error)}"], how)
    faults = {key for key, place in wanted.items() if not _same_rows(place, numbers, read.get(key))}
    return Check.count("ldm/reader", sorted(faults | (read.keys() - wanted)), f"{how}; {len(wanted)} tensors")


def reads_width(family: str, transformer: Mapping[str, Shape]) -> bool:
    """Whether diffusers reads files of the transformer whose tensors have these shapes: of FLUX, those of one width."""
    flux = FAMILIES[family].denoiser_class == "FluxTransformer2DModel"
    return not flux or size("transformer", transformer, "context_embedder.weight", 0) == FLUX_WIDTH


def _row_numbers(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """For each tensor the numbers (rows, 1) of its rows; no two rows of two tensors have one number."""
    import torch

    counts = [shape[0] for shape in shapes.values()]
    starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
    spans = zip(shapes.items(), pairwise(starts), strict=True)
    return {key: torch.arange(*span).reshape(-1, *[1] * (len(shape) - 1)) for (key, shape), span in spans}


def _same_rows(place: TensorLocation, numbers: Mapping[str, Tensor], read: Tensor | None) -> bool:
    import torch

    own = numbers[place.key][place.start : place.start + (place.rows or place.shape[0])]
    if place.swapped:
        own = torch.cat(own.chunk(2)[::-1])
    return read is not None and torch.equal(own, read)


def _converter(family: str) -> Any:
    """diffusers' function from the tensors of a single file to those of the transformer's class."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return SINGLE_FILE_LOADABLE_CLASSES[FAMILIES[family].denoiser_class]["checkpoint_mapping_fn"]
