"""What the readers of a single file rebuild, compared with the configs of the folder that the file is written from.

A single file holds tensors and no configs. diffusers' from_single_file, ComfyUI and A1111 take the configs and the
tokenizer of the published model of the family; erasec takes the same values and reads the sizes from the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.ldm.configs import (
    LAYOUTS,
    NOISE_DEFAULTS,
    POSITIONS,
    VOCABULARY,
    Shapes,
    config_files,
    default_prediction,
    sizes_from_shapes,
)
from erasec.ldm.skeleton import clip_vocabulary

if TYPE_CHECKING:
    from erasec.checkpoint.folder import Folder
    from erasec.family import Sizes

# The fields of a config that change what a network computes, or how a pipeline uses it, with the values that the
# library takes where a config leaves them out. A field that no config here lists is compared by its shapes alone.
UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": VOCABULARY - 1,
}
INDEX = {"force_zeros_for_empty_prompt": True}
# Fields that change no picture of a given size beyond rounding: the default size, and where to compute in float32.
METADATA = {"unet": ("sample_size", "upcast_attention"), "vae": ("sample_size", "force_upcast")}
# Classes that compute the same, by the name that is compared.
SAME_CLASS = {"CLIPTokenizerFast": "CLIPTokenizer"}


class Difference(NamedTuple):
    """A setting that a single file does not hold: a folder's value and the one that readers of the file take.

    ``setting`` is a component and a field, such as "vae scaling_factor". ``pictures`` says whether the pictures differ.
    """

    setting: str
    own: Any
    read: Any
    pictures: bool = True

    def __str__(self) -> str:
        return f"{self.setting} is {_short(self.own)} and readers take {_short(self.read)}"


def check_readers(folder: Folder, family: str, shapes: Shapes, prediction: str, rescaled: bool) -> tuple[str, ...]:
    """Sentences about what the readers of a single file do not get from it, for a ``folder`` of these ``shapes``.

    ``prediction`` and ``rescaled`` are what the file will state, as ``write_skeleton`` takes them. Raises ErasecError
    if the readers would rebuild a model that makes other pictures, or none.
    """
    sizes = sizes_from_shapes(family, shapes)
    title = FAMILIES[family].title
    if needs_configs(folder, family, sizes):
        return (only_with_configs(title),)
    differing = list(differences(folder, family, sizes, prediction, rescaled))
    refuse_differences(differing, title, folder.root)
    notes = []
    if not is_published(family, sizes):
        notes.append(without_published_sizes(title))
    elif prediction != default_prediction(family, sizes):
        notes.append(
            f"ldm: the file states that the UNet predicts {prediction}. diffusers does not read this: give "
            "from_single_file the folder hf as its config=."
        )
    if differing:
        notes.append(lost_metadata(differing))
    return tuple(notes)


def only_with_configs(title: str) -> str:
    """The note about a file of a small model, for whose sizes no reader brings configs."""
    return (
        f"ldm: the model has neither the sizes of {title} nor CLIP's vocabulary, so only a reader that is given its "
        "configs takes the file, as in from_single_file(FILE, config=FOLDER); ComfyUI, A1111 and erasec refuse it."
    )


def without_published_sizes(title: str) -> str:
    """The note about a file of a model of other sizes than the published ones, with CLIP's vocabulary."""
    return (
        f"ldm: the model has not the sizes of {title}: readers that know only these refuse the file; "
        "from_single_file takes it with config=FOLDER."
    )


def lost_metadata(differing: Sequence[Difference]) -> str:
    """The note about settings that a file does not hold and that change no picture."""
    return f"ldm: the file does not hold all settings: {'; '.join(map(str, differing))}."


def refuse_differences(differing: Sequence[Difference], title: str, root: Path) -> None:
    """Raise ErasecError if the readers of a single file would make other pictures than the folder ``root``."""
    if wrong := [difference for difference in differing if difference.pictures]:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ErasecError(
            f"a single file would not be this model: {wrong[0]}",
            why="a single file holds no configs and no tokenizer: its readers take those of the published "
            f"{title}" + "".join(f"; {difference}" for difference in wrong[1:3]) + more,
            fix="use the target hf, which keeps the configs",
            where=str(root),
        )


def is_published(family: str, sizes: Sizes) -> bool:
    """Whether UNet and VAE have the sizes of the family's published model, as all readers expect."""
    full = LAYOUTS[family].sizes["full"]
    return (sizes.widths, sizes.depths, sizes.vae) == (full.widths, full.depths, full.vae)


def needs_configs(folder: Folder, family: str, sizes: Sizes) -> bool:
    """Whether no reader takes a single file of these ``sizes`` unless it is given the configs of the ``folder``.

    Readers that bring configs refuse other sizes than the published ones, and erasec a vocabulary that is not CLIP's.
    A vocabulary that extends CLIP's counts as CLIP's: such a file looks like a model that readers know.
    """
    if is_published(family, sizes):
        return False
    return not extends_clip(folder)


def extends_clip(folder: Folder) -> bool:
    """Whether the first tokenizer of a ``folder`` knows all tokens of CLIP's vocabulary, by their ids."""
    own = _tokenizer(folder, "tokenizer").vocabulary
    return all(own.get(token) == number for token, number in clip_vocabulary()[0].items())


def differences(folder: Folder, family: str, sizes: Sizes, prediction: str, rescaled: bool) -> Iterator[Difference]:
    """The settings in which a ``folder`` differs from what the readers of its single file rebuild."""
    files = config_files(family, sizes, prediction, rescaled)
    index = files["model_index.json"]
    for name in FAMILIES[family].components:
        own: Mapping[str, Any] = folder.config(name)
        if name in FAMILIES[family].text_encoders:
            text = sizes.texts[FAMILIES[family].text_encoders.index(name)]
            own = {**own, "vocab_size": text.vocabulary, "max_position_embeddings": text.positions}
        yield from compare_configs(name, own, files[f"{name}/config.json"])
    for name, (_, kind) in ((name, value) for name, value in index.items() if isinstance(value, list)):
        own_kind = (folder.index.get(name) or [None, None])[1]
        if kind is not None and name != "scheduler" and SAME_CLASS.get(own_kind, own_kind) != kind:
            yield Difference(f"{name} class", own_kind, kind)
    for field in INDEX.keys() & index.keys():
        yield from _differing("model_index", field, folder.index.get(field, INDEX[field]), index[field])
    yield from compare_schedulers(
        folder.config("scheduler", "scheduler_config.json"), files["scheduler/scheduler_config.json"]
    )
    yield from clip_differences(folder, LAYOUTS[family].pad_tokens)


def clip_differences(folder: Folder, pads: Sequence[str]) -> Iterator[Difference]:
    """What the CLIP tokenizers of a folder have otherwise than CLIP's own, padded with the tokens ``pads``."""
    for number, pad in enumerate(pads):
        name = f"tokenizer_{number + 1}" if number else "tokenizer"
        yield from _compare_tokenizers(name, _tokenizer(folder, name), pad)


def compare_configs(component: str, own: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[Difference]:
    """The fields in which two configs of a UNet, a VAE or a text encoder differ."""
    fields = TEXT if component.startswith("text_encoder") else UNET if component == "unet" else VAE
    yield from compare_fields(component, own, read, fields, METADATA.get(component, ()))


def compare_fields(
    component: str,
    own: Mapping[str, Any],
    read: Mapping[str, Any],
    fields: Mapping[str, Any],
    metadata: Sequence[str] = (),
) -> Iterator[Difference]:
    """The ``fields``, by their default values, in which two configs differ. Those in ``metadata`` change no picture."""
    for field, default in fields.items():
        pictures = field not in metadata
        yield from _differing(component, field, own.get(field, default), read.get(field, default), pictures)


def compare_schedulers(own: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[Difference]:
    """Differences of the noise schedule, which belongs to the weights, and of the sampler, which readers choose."""
    for field, default in {**NOISE_DEFAULTS, "rescale_betas_zero_snr": False}.items():
        yield from _differing("scheduler", field, own.get(field, default), read.get(field, default))
    yield from _differing("scheduler", "class", own.get("_class_name"), read["_class_name"], pictures=False)


class _Tokenizer(NamedTuple):
    """The ids of a folder's tokens, its padding token, and the longest prompt; None where the folder does not say."""

    vocabulary: dict[str, int]
    pad: str | None
    longest: int | None


def _tokenizer(folder: Folder, name: str) -> _Tokenizer:
    vocab, added, whole, settings, special = (
        folder.config(name, file) if (folder.root / name / file).is_file() else {}
        for file in (
            "vocab.json",
            "added_tokens.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        )
    )
    vocabulary = vocab or dict(whole.get("model", {}).get("vocab", {}))
    added = {**{token["content"]: token["id"] for token in whole.get("added_tokens", ())}, **added}
    pad = {**settings, **special}.get("pad_token")
    longest = settings.get("model_max_length")
    return _Tokenizer(
        {**vocabulary, **added},
        pad.get("content") if isinstance(pad, dict) else pad,
        longest if isinstance(longest, int) and longest < 10**6 else None,  # "no limit" is a very large number
    )


def _compare_tokenizers(name: str, own: _Tokenizer, pad: str) -> Iterator[Difference]:
    clip = clip_vocabulary()[0]
    if own.vocabulary != clip:
        others = len(own.vocabulary.items() - clip.items())
        yield Difference(
            f"{name} vocabulary", f"{len(own.vocabulary)} tokens, {others} of them not CLIP's,", f"CLIP's {len(clip)}"
        )
    if own.pad is not None:
        yield from _differing(name, "pad_token", own.pad, pad)
    if own.longest is not None:
        yield from _differing(name, "model_max_length", own.longest, POSITIONS)


def _differing(component: str, field: str, own: Any, read: Any, pictures: bool = True) -> Iterator[Difference]:
    if _comparable(field, own) != _comparable(field, read):
        yield Difference(f"{component} {field}", own, read, pictures)


def _comparable(field: str, value: Any) -> Any:
    """A value of a config in a form in which equal settings are equal: one number for a list of the same numbers."""
    if isinstance(value, list | tuple):
        items = [_comparable(field, item) for item in value]
        return items[0] if items and all(item == items[0] for item in items) else items
    if field == "eos_token_id" and value == 2:
        return VOCABULARY - 1  # in transformers both mean the first end token of a prompt (see ``_text_encoder``)
    return False if field == "mid_block_only_cross_attention" and value is None else value


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
