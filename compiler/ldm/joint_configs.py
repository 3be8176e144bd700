"""Configs of diffusers folders of transformers: computed from the shapes of their tensors.

Values that no tensor shows are in the family file. They are those of the published models:
stabilityai/stable-diffusion-3-medium, -3.5-medium and -3.5-large, black-forest-labs/FLUX.1-dev and FLUX.1-schnell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from erasec.errors import ErasecError
from erasec.family import FAMILIES, JointConfigs, Shape, TextSizes
from erasec.ldm.configs import Shapes, count, size, text_config, text_sizes, vae_config, vae_widths
from erasec.ldm.tensor_names import LAYOUTS as SINGLE_FILES

IMAGE_SIZE = 1024
VAE_WIDTHS = (128, 256, 512, 512)  # of the published models
# The VAEs of these models have no convolutions beside the latents.
VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def layout(family: str) -> JointConfigs:
    """The config values of a family. Raises ErasecError for a family without them."""
    configs = FAMILIES[family].joint_configs
    if configs is None:
        raise ErasecError(f"erasec has no configs of the transformers of {family}")
    return configs


def clip_sizes(family: str, shapes: Shapes) -> dict[str, TextSizes]:
    """The sizes of the CLIP text encoders, by component. Raises ErasecError for names that are not those of CLIP."""
    names = (name for name in FAMILIES[family].text_encoders if name not in SINGLE_FILES[family].t5)
    return {name: text_sizes(name, shapes[name], name in layout(family).projected) for name in names}


def config_files(family: str, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder, by their path in it, except for the tokenizers' and those of T5.

    ``shapes`` are those of the tensors by component and tensor name.
    """
    own, single = layout(family), SINGLE_FILES[family]
    index: dict[str, Any] = {
        "_class_name": own.pipeline,
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", SCHEDULER],
        "transformer": ["diffusers", FAMILIES[family].denoiser_class],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name in single.t5:
        index |= {name: [None, None], name.replace("text_encoder", "tokenizer"): [None, None]}
    files = {
        "model_index.json": index,
        "transformer/config.json": transformer_config(family, shapes["transformer"]),
        "vae/config.json": vae_config_of(family, shapes["vae"]),
        "scheduler/scheduler_config.json": scheduler_config(family, shapes["transformer"]),
    }
    for (name, text), activation in zip(clip_sizes(family, shapes).items(), own.activations, strict=True):
        files[f"{name}/config.json"] = text_config(text, activation)
        index[name] = ["transformers", files[f"{name}/config.json"]["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return files


def vae_config_of(family: str, vae: Mapping[str, Shape]) -> dict[str, Any]:
    """The config of the VAE whose tensors have these shapes."""
    layers = count(vae, "encoder.down_blocks.0.resnets.")
    latents = size("vae", vae, "decoder.conv_in.weight", 1)
    return {**vae_config(vae_widths(vae), layers, latents, IMAGE_SIZE), **VAE, **layout(family).vae}


def scheduler_config(family: str, transformer: Mapping[str, Shape]) -> dict[str, Any]:
    """The config of the scheduler that suits the transformer whose tensors have these shapes."""
    own = layout(family)
    guided = "time_text_embed.guidance_embedder.linear_1.weight" in transformer
    return {
        "_class_name": SCHEDULER,
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": 1000,
        **own.scheduler,
        **({} if guided else own.unguided),
    }


def published(family: str, shapes: Shapes) -> bool:
    """Whether the transformer, and the VAE if it is there, have the sizes of a published model, as readers expect."""
    blocks = count(shapes["transformer"], "transformer_blocks.")
    own = (blocks, size("transformer", shapes["transformer"], "context_embedder.weight", 0))
    return own in layout(family).published and ("vae" not in shapes or vae_widths(shapes["vae"]) == VAE_WIDTHS)


def transformer_config(family: str, transformer: Mapping[str, Shape]) -> dict[str, Any]:
    """The config of the transformer whose tensors have these shapes. Raises ErasecError where one is missing."""
    kind, own = FAMILIES[family].denoiser_class, layout(family)

    def dimension(key: str, axis: int) -> int:
        return size("transformer", transformer, key, axis)

    norm = "transformer_blocks.0.attn.norm_q.weight"
    width = dimension("context_embedder.weight", 0)
    head = dimension(norm, 0) if norm in transformer else own.head_size
    return {
        "_class_name": kind,
        "_diffusers_version": "0.42.1",
        "attention_head_dim": head,
        "joint_attention_dim": dimension("context_embedder.weight", 1),
        "num_attention_heads": max(1, width // head),
        "num_layers": count(transformer, "transformer_blocks."),
        "pooled_projection_dim": dimension("time_text_embed.text_embedder.linear_1.weight", 1),
        **own.transformer,
        **MORE[kind](transformer, dimension, own.transformer),
    }


def _sd3(transformer: Mapping[str, Shape], dimension: Callable[..., int], own: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(count(transformer, "transformer_blocks."))
    second = "transformer_blocks.{}.attn2.to_q.weight"
    side = math.isqrt(dimension("pos_embed.pos_embed", 1))
    return {
        "caption_projection_dim": dimension("context_embedder.weight", 0),
        "dual_attention_layers": [layer for layer in layers if second.format(layer) in transformer],
        "in_channels": dimension("pos_embed.proj.weight", 1),
        "out_channels": dimension("proj_out.weight", 0) // own["patch_size"] ** 2,
        "pos_embed_max_size": side,
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in transformer else None,
        "sample_size": min(own["sample_size"], own["patch_size"] * side),  # a small model has no more positions
    }


def _flux(transformer: Mapping[str, Shape], dimension: Callable[..., int], own: Mapping[str, Any]) -> dict[str, Any]:
    inputs, outputs = dimension("x_embedder.weight", 1), dimension("proj_out.weight", 0)
    return {
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in transformer,
        "in_channels": inputs,
        "num_single_layers": count(transformer, "single_transformer_blocks."),
        "out_channels": None if inputs == outputs else outputs,
    }


# Further entries of the config of each class.
MORE: dict[str, Callable[..., dict[str, Any]]] = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux}
