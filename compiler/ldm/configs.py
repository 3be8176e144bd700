"""Configs of the Stable Diffusion families as tables: from sizes to diffusers' JSON files, and from shapes to sizes.

Values are those of the published models: CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1 and
stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erasec.errors import ErasecError, nearest
from erasec.family import FAMILIES, Shape, detect

Shapes = Mapping[str, Mapping[str, Shape]]

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, POSITIONS = 49408, 77

# The VAE's attention as the published SD 1 and SD 2 name it, and as the libraries have done since.
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Text:
    """Sizes of a CLIP text encoder; ``projection`` is the width of its projection layer, 0 where it has none."""

    width: int
    layers: int
    mlp: int
    projection: int = 0


@dataclass(frozen=True)
class Sizes:
    """The sizes in which models of one family differ.

    ``widths`` are the UNet's channels by level and ``depths`` its transformer blocks by level, 0 where a level has no
    attention; ``added`` is the width of what SDXL embeds beside the time; ``vae`` are the VAE's channels by level.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    texts: tuple[Text, ...]
    vae: tuple[int, ...]
    added: int = 0
    inputs: int = 4
    latents: int = 4
    layers: int = 2
    vae_layers: int = 2


@dataclass(frozen=True)
class Layout:
    """What a family's configs say and no tensor shows. ``head_channels`` 0: the UNet has 8 heads at every level."""

    pipeline: str
    image: int
    scaling: float
    activations: tuple[str, ...]
    pads: tuple[str, ...]
    scheduler: Mapping[str, Any]
    head_channels: int = 64


PNDM = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
DDIM = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
EULER = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading",
         "use_karras_sigmas": False}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "steps_offset": 1, "trained_betas": None}  # fmt: skip

LAYOUTS = {
    "sd1": Layout("StableDiffusion", 512, 0.18215, ("quick_gelu",), (END,), PNDM, head_channels=0),
    "sd2": Layout("StableDiffusion", 768, 0.18215, ("gelu",), ("!",), DDIM),
    "sdxl": Layout("StableDiffusionXL", 1024, 0.13025, ("quick_gelu", "gelu"), (END, "!"), EULER),
}

SIZES = {
    ("sd1", "full"): Sizes((320, 640, 1280, 1280), (1, 1, 1, 0), (Text(768, 12, 3072),), (128, 256, 512, 512)),
    ("sd2", "full"): Sizes((320, 640, 1280, 1280), (1, 1, 1, 0), (Text(1024, 23, 4096),), (128, 256, 512, 512)),
    ("sdxl", "full"): Sizes((320, 640, 1280), (0, 2, 10), (Text(768, 12, 3072), Text(1280, 32, 5120, 1280)),
                            (128, 256, 512, 512), added=2816),
    ("sd1", "tiny"): Sizes((32, 64, 64, 64), (1, 1, 1, 0), (Text(64, 2, 256),), (32, 32, 64, 64)),
    ("sd2", "tiny"): Sizes((32, 64, 128, 64), (1, 1, 1, 0), (Text(64, 3, 256),), (32, 32, 64, 64)),
    ("sdxl", "tiny"): Sizes((32, 64, 128), (0, 1, 2), (Text(32, 2, 128), Text(64, 3, 256, 64)),
                            (32, 32, 64, 64), added=256),
}  # fmt: skip


def usual_prediction(family: str, sizes: Sizes) -> str:
    """What a UNet of this family and these sizes is taken to predict, "epsilon" or "v_prediction"."""
    # Of SD 2 only the 768-pixel model predicts v; its 512-pixel base and inpainting models are trained as SD 1 is.
    return "v_prediction" if family == "sd2" and sizes.inputs == sizes.latents else "epsilon"


def config_files(family: str, sizes: Sizes, prediction: str = "", rescaled: bool = False) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers folder by their path in it, tokenizers left out; see ``write_skeleton``."""
    layout, inpaints = LAYOUTS[family], sizes.inputs != sizes.latents
    prediction = prediction or usual_prediction(family, sizes)
    smaller = family == "sd2" and prediction == "epsilon"
    image, scheduler = (512, PNDM) if smaller else (layout.image, layout.scheduler)
    index: dict[str, Any] = {
        "_class_name": layout.pipeline + ("InpaintPipeline" if inpaints else "Pipeline"),
        "_diffusers_version": "0.42.1", "feature_extractor": [None, None], "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    files = {
        "model_index.json": index,
        "unet/config.json": _unet(family, sizes, image // 8),
        "vae/config.json": _vae(family, sizes, image),
        "scheduler/scheduler_config.json": {**BETAS, **scheduler, "prediction_type": prediction},
    }
    for name, text, activation in zip(FAMILIES[family].text_encoders, sizes.texts, layout.activations, strict=True):
        files[f"{name}/config.json"] = _text(family, text, activation)
        index[name] = ["transformers", files[f"{name}/config.json"]["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if rescaled:
        files["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"] = True
    return files


def _unet(family: str, sizes: Sizes, sample: int) -> dict[str, Any]:
    channels = LAYOUTS[family].head_channels
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1", "act_fn": "silu",
        "attention_head_dim": [max(1, width // channels) for width in sizes.widths] if channels else 8,
        "block_out_channels": list(sizes.widths), "center_input_sample": False,
        "cross_attention_dim": sum(text.width for text in sizes.texts),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in sizes.depths],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": sizes.inputs,
        "layers_per_block": sizes.layers, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32,
        "out_channels": sizes.latents, "sample_size": sample,
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(sizes.depths)],
    }  # fmt: skip
    if family != "sd1":
        config |= {"use_linear_projection": True, "upcast_attention": family == "sd2"}
    if family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            # Six numbers, sizes and crops, are embedded each by itself and stand beside the pooled text.
            "addition_time_embed_dim": (sizes.added - sizes.texts[-1].projection) // 6,
            "projection_class_embeddings_input_dim": sizes.added,
            "transformer_layers_per_block": [max(1, depth) for depth in sizes.depths],
        }
    return config


def _vae(family: str, sizes: Sizes, image: int) -> dict[str, Any]:
    levels = len(sizes.vae)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1", "act_fn": "silu",
        "block_out_channels": list(sizes.vae), "down_block_types": ["DownEncoderBlock2D"] * levels, "in_channels": 3,
        "latent_channels": sizes.latents, "layers_per_block": sizes.vae_layers, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": image, "scaling_factor": LAYOUTS[family].scaling,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip
    return config | ({"force_upcast": True} if family == "sdxl" else {})


def _text(family: str, text: Text, activation: str) -> dict[str, Any]:
    # The token ids are wrong, as published: at end token 2 transformers pools the highest id, which is the end token's.
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"],
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": activation,
        "hidden_size": text.width, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": text.mlp, "layer_norm_eps": 1e-5, "max_position_embeddings": POSITIONS,
        "model_type": "clip_text_model", "num_attention_heads": max(1, text.width // 64),
        "num_hidden_layers": text.layers, "pad_token_id": 1,
        "projection_dim": text.projection or (512 if family == "sd2" else text.width),
        # Without it transformers loads half-precision weights in half, and diffusers the UNet in single.
        "torch_dtype": "float32", "vocab_size": VOCABULARY,
    }  # fmt: skip


def sizes_from_shapes(family: str, shapes: Shapes) -> Sizes:
    """Read a model's sizes from its tensors' shapes. Raises ErasecError that names what does not fit the family."""
    known(family)
    if missing := [name for name in FAMILIES[family].components if not shapes.get(name)]:
        raise ErasecError(f"there are no tensors of {', '.join(missing)}", why=f"a whole {family} model has them")
    unet, vae = shapes["unet"], shapes["vae"]
    if (found := detect(unet).name) != family:
        raise ErasecError(f"the UNet is not of the family {family}", why=f"by its shapes it is {found}")
    down = [f"down_blocks.{level}." for level in range(_count(unet, "down_blocks."))]
    encoder = [f"encoder.down_blocks.{level}." for level in range(_count(vae, "encoder.down_blocks."))]
    sizes = Sizes(
        widths=tuple(_size("unet", unet, f"{block}resnets.0.conv1.weight", 0) for block in down),
        depths=tuple(_count(unet, f"{block}attentions.0.transformer_blocks.") for block in down),
        texts=tuple(_text_sizes(name, shapes[name]) for name in FAMILIES[family].text_encoders),
        vae=tuple(_size("vae", vae, f"{block}resnets.0.conv1.weight", 0) for block in encoder),
        added=_size("unet", unet, "add_embedding.linear_1.weight", 1) if family == "sdxl" else 0,
        inputs=_size("unet", unet, "conv_in.weight", 1),
        latents=_size("vae", vae, "decoder.conv_in.weight", 1),
        layers=_count(unet, "down_blocks.0.resnets."),
        vae_layers=_count(vae, "encoder.down_blocks.0.resnets."),
    )
    if sizes.inputs not in (sizes.latents, 2 * sizes.latents + 1):
        raise ErasecError(
            f"the UNet takes {sizes.inputs} channels", fix="give the model as a diffusers folder",
            why=f"text to image takes {sizes.latents}, inpainting {2 * sizes.latents + 1}; no others are known here",
        )  # fmt: skip
    if (sizes.added - sizes.texts[-1].projection) % 12 and family == "sdxl":
        raise ErasecError(
            f"the UNet embeds {sizes.added} numbers beside the time",
            why=f"they should be six even parts and {sizes.texts[-1].projection} of text; the refiner has five",
        )
    return sizes


def known(family: str) -> None:
    """Raise ErasecError where the family has no layout here."""
    if family not in LAYOUTS:
        raise ErasecError(f"there is no layout for the family {family!r}", why=nearest(family, LAYOUTS))


def plain(key: str) -> str:
    """A published key as the libraries name it now."""
    return rename(key.removeprefix("text_model."), OLD_VAE)


def rename(key: str, names: Mapping[str, str]) -> str:
    """``key`` with the layers of the VAE's attention renamed."""
    for old, new in names.items():
        key = key.replace(f"mid_block.attentions.0.{old}.", f"mid_block.attentions.0.{new}.")
    return key


def _text_sizes(component: str, shapes: Mapping[str, Shape]) -> Text:
    tensors = {plain(key): shape for key, shape in shapes.items()}
    words, width = (_size(component, tensors, "embeddings.token_embedding.weight", axis) for axis in (0, 1))
    if words != VOCABULARY:
        raise ErasecError(
            f"{component} knows {words} tokens, CLIP has {VOCABULARY}", why="its tokenizer is not CLIP's",
            fix="give a diffusers folder, which holds its own tokenizer",
        )  # fmt: skip
    layers = _count(tensors, "encoder.layers.")
    mlp = _size(component, tensors, "encoder.layers.0.mlp.fc1.weight", 0)
    projects = component == "text_encoder_2"
    return Text(width, layers, mlp, _size(component, tensors, "text_projection.weight", 0) if projects else 0)


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    """How many different numbers follow ``prefix`` in the keys."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})


def _size(component: str, shapes: Mapping[str, Shape], key: str, axis: int) -> int:
    if key not in shapes or len(shapes[key]) <= axis:
        raise ErasecError(
            f"{component} has no {key} to read its size from", why="its keys are not as diffusers has them"
        )
    return shapes[key][axis]
