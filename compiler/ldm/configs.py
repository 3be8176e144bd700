"""Configs of diffusers folders: computed from the sizes of a model, and sizes read from the shapes of its tensors.

The values in common to all families are here, those of one family in its data file. They are the values of the
published models: CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1 and
stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from erasec.errors import ErasecError, suggestion
from erasec.family import FAMILIES, Shape, Sizes, TextSizes, detect
from erasec.ldm.tensor_names import canonical

Shapes = Mapping[str, Mapping[str, Shape]]

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, POSITIONS = TextSizes.vocabulary, TextSizes.positions  # CLIP's

# What schedulers of diffusers take where their config leaves out the noise schedule.
NOISE_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
# Scheduler settings that all families share.
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "trained_betas": None,
}

# The families whose configs erasec can write.
LAYOUTS = {name: family.configs for name, family in FAMILIES.items() if family.configs is not None}


def default_prediction(family: str, sizes: Sizes) -> str:
    """The prediction type to assume for a UNet of this family and these sizes: "epsilon" or "v_prediction"."""
    return LAYOUTS[family].prediction_type if sizes.inputs == sizes.latents else "epsilon"


def config_files(family: str, sizes: Sizes, prediction: str = "", rescaled: bool = False) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder, by their path in it, except for the tokenizers'.

    ``prediction`` and ``rescaled`` are as in ``write_skeleton``.
    """
    layout, inpainting = LAYOUTS[family], sizes.inputs != sizes.latents
    prediction = prediction or default_prediction(family, sizes)
    image_size, scheduler = layout.image_size, layout.scheduler
    if prediction == "epsilon" and layout.epsilon is not None:
        image_size, scheduler = layout.epsilon.image_size, layout.epsilon.scheduler
    index: dict[str, Any] = {
        "_class_name": layout.pipeline + ("InpaintPipeline" if inpainting else "Pipeline"),
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= layout.model_index
    if "requires_safety_checker" in index:
        index["safety_checker"] = [None, None]
    files = {
        "model_index.json": index,
        "unet/config.json": _unet(family, sizes, image_size // 8),
        "vae/config.json": vae_config(sizes.vae, sizes.vae_layers, sizes.latents, image_size)
        | {"scaling_factor": layout.scaling_factor, **layout.vae},
        "scheduler/scheduler_config.json": {**BETAS, **scheduler, "prediction_type": prediction},
    }
    for name, text, activation in zip(FAMILIES[family].text_encoders, sizes.texts, layout.activations, strict=True):
        files[f"{name}/config.json"] = text_config(text, activation, layout.projection_dim)
        index[name] = ["transformers", files[f"{name}/config.json"]["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if rescaled:
        files["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"] = True
    return files


def _unet(family: str, sizes: Sizes, sample_size: int) -> dict[str, Any]:
    channels = LAYOUTS[family].head_channels
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "attention_head_dim": [max(1, width // channels) for width in sizes.widths] if channels else 8,
        "block_out_channels": list(sizes.widths),
        "center_input_sample": False,
        "cross_attention_dim": sum(text.width for text in sizes.texts),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in sizes.depths],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": sizes.inputs,
        "layers_per_block": sizes.layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": sizes.latents,
        "sample_size": sample_size,
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(sizes.depths)],
    }
    config |= LAYOUTS[family].unet
    if sizes.added:
        config |= {
            "addition_embed_type": "text_time",
            # Six numbers (sizes and crops) are embedded separately, and concatenated with the pooled text.
            "addition_time_embed_dim": (sizes.added - sizes.texts[-1].projection) // 6,
            "projection_class_embeddings_input_dim": sizes.added,
            "transformer_layers_per_block": [max(1, depth) for depth in sizes.depths],
        }
    return config


def vae_config(widths: Sequence[int], layers: int, latents: int, image_size: int) -> dict[str, Any]:
    """The config of a VAE with these ``widths`` per level, without its factors."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": latents,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": image_size,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def text_config(text: TextSizes, activation: str, projection_dim: int = 0) -> dict[str, Any]:
    """The config of a CLIP text encoder; ``projection_dim`` is what it states if it has no projection."""
    # These token ids are wrong, as in the published configs. If the end token is 2, transformers pools the state at the
    # highest id, which is that of the end token.
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": text.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": text.mlp,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, text.width // 64),
        "num_hidden_layers": text.layers,
        "pad_token_id": 1,
        "projection_dim": text.projection or projection_dim or text.width,
        # Without this entry transformers would load float16 weights as float16, and diffusers the UNet as float32.
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def sizes_from_shapes(family: str, shapes: Shapes) -> Sizes:
    """Read the sizes of a model from the shapes of its tensors, by component and tensor name.

    Raises ErasecError that names the component or tensor that does not fit the family.
    """
    check_known(family)
    if missing := [name for name in FAMILIES[family].components if not shapes.get(name)]:
        raise ErasecError(f"there are no tensors of {', '.join(missing)}", why=f"a complete {family} model has them")
    unet, vae = shapes["unet"], shapes["vae"]
    if (detected := detect(unet).name) != family:
        raise ErasecError(f"the UNet is not of the family {family}", why=f"by its shapes it is {detected}")
    down = [f"down_blocks.{level}." for level in range(count(unet, "down_blocks."))]
    projected = LAYOUTS[family].projected
    single_file = FAMILIES[family].single_file
    embeds_sizes = single_file is not None and single_file.size_embedding
    sizes = Sizes(
        widths=tuple(size("unet", unet, f"{block}resnets.0.conv1.weight", 0) for block in down),
        depths=tuple(count(unet, f"{block}attentions.0.transformer_blocks.") for block in down),
        texts=tuple(text_sizes(name, shapes[name], name in projected) for name in FAMILIES[family].text_encoders),
        vae=vae_widths(vae),
        added=size("unet", unet, "add_embedding.linear_1.weight", 1) if embeds_sizes else 0,
        inputs=size("unet", unet, "conv_in.weight", 1),
        latents=size("vae", vae, "decoder.conv_in.weight", 1),
        layers=count(unet, "down_blocks.0.resnets."),
        vae_layers=count(vae, "encoder.down_blocks.0.resnets."),
    )
    if sizes.inputs not in (sizes.latents, 2 * sizes.latents + 1):
        raise ErasecError(
            f"the UNet takes {sizes.inputs} channels",
            why=f"text to image takes {sizes.latents} and inpainting {2 * sizes.latents + 1}; others are unsupported",
            fix="give the model as a diffusers folder",
        )
    if (sizes.added - sizes.texts[-1].projection) % 12 and embeds_sizes:
        raise ErasecError(
            f"the UNet embeds {sizes.added} numbers in addition to the timestep",
            why=f"SDXL's base model embeds {sizes.texts[-1].projection} numbers of pooled text and six size embeddings "
            "of one even width; the refiner has five",
        )
    return sizes


def vae_widths(vae: Mapping[str, Shape]) -> tuple[int, ...]:
    """The channels of a VAE's levels, from the shapes of its tensors."""
    levels = range(count(vae, "encoder.down_blocks."))
    return tuple(size("vae", vae, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0) for level in levels)


def check_clip(texts: Mapping[str, TextSizes]) -> None:
    """Raise ErasecError for a text encoder, by its component, that has another vocabulary or other prompts than
    CLIP's."""
    for component, text in texts.items():
        for own, clips, what in (
            (text.vocabulary, VOCABULARY, "tokens"),
            (text.positions, POSITIONS, "positions of a prompt"),
        ):
            if own != clips:
                raise ErasecError(
                    f"{component} knows {own} {what}, CLIP has {clips}",
                    why="its tokenizer is not CLIP's",
                    fix="give the model as a diffusers folder, which contains its tokenizer",
                )


def check_known(family: str) -> None:
    """Raise ErasecError if erasec cannot write configs of the family."""
    if family not in LAYOUTS:
        raise ErasecError(f"there is no layout for the family {family!r}", why=suggestion(family, LAYOUTS))


def text_sizes(component: str, shapes: Mapping[str, Shape], projected: bool) -> TextSizes:
    """The sizes of a CLIP text encoder, ``projected`` if it has a projection layer, from the shapes of its tensors."""
    tensors = {canonical(component, key): shape for key, shape in shapes.items()}
    vocabulary, width = (
        size(component, tensors, "text_model.embeddings.token_embedding.weight", axis) for axis in (0, 1)
    )
    positions = size(component, tensors, "text_model.embeddings.position_embedding.weight", 0)
    layers = count(tensors, "text_model.encoder.layers.")
    mlp = size(component, tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 0)
    projection = size(component, tensors, "text_projection.weight", 0) if projected else 0
    return TextSizes(width, layers, mlp, projection, vocabulary, positions)


def count(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many different numbers follow ``prefix`` in the tensor names."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})


def size(component: str, shapes: Mapping[str, Shape], key: str, axis: int) -> int:
    """One size of a tensor. Raises ErasecError where there is no such tensor, or not of as many dimensions."""
    if key not in shapes or len(shapes[key]) <= axis:
        raise ErasecError(
            f"{component} has no {key} to read its size from", why="its tensor names are not those of diffusers"
        )
    return shapes[key][axis]
