"""Writes the trained weights of a reference world as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasec.checkpoint.safetensors import save_tensors
from erasec.model.loading import NOTICE, bundled_folder
from erasec.recipe import presets
from erasec.worlds import networks
from erasec.worlds.base import Sizes

State = Mapping[str, Tensor]

SCHEDULER = "DPMSolverMultistepScheduler"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# model_index.json, as StableDiffusionPipeline writes it.
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", SCHEDULER],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: Path, captions: list[str], size: int) -> None:
    """Train a tokenizer of at most ``size`` entries on ``captions`` and write the files that CLIPTokenizer reads."""
    vocabulary, merges = networks.train_bpe(captions, size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": networks.START,
        "eos_token": networks.END,
        "pad_token": networks.END,
        "unk_token": networks.END,
    }
    _write_json(folder / "special_tokens_map.json", special)
    more = {"tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", {**special, **more, "model_max_length": networks.POSITIONS})


def tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def write_pipeline(out: Path, sizes: Sizes, text: State, vae: State, scaling_factor: float, dtype: torch.dtype) -> None:
    """Write everything except the UNet and the tokenizer, which must be in ``out/tokenizer``. Weights are cast to
    ``dtype``."""
    tokens = tokenizer(out / "tokenizer")
    encoder = networks.text_encoder(sizes, len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    empty_vae = networks.vae(sizes)
    empty_vae.register_to_config(scaling_factor=scaling_factor)
    # Without a dtype in the config, transformers loads float16 weights as float16, and diffusers as float32.
    own = {"architectures": ["CLIPTextModel"], "dtype": None, "torch_dtype": "float32"}
    config = {**json.loads(encoder.config.to_json_string()), **own}
    _write_json(
        out / "text_encoder" / "config.json", {key: value for key, value in config.items() if value is not None}
    )
    _write_json(out / "vae" / "config.json", _public_config(empty_vae.config))
    _write_json(out / "scheduler" / "scheduler_config.json", {**networks.SCHEDULER, "_class_name": SCHEDULER})
    _write_json(out / "model_index.json", INDEX)
    # The tensor names of Stable Diffusion's text encoder, which every version of transformers reads.
    text = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in text.items()}
    _write_tensors(out / "text_encoder" / "model.safetensors", text, dtype)
    _write_tensors(out / "vae" / WEIGHTS, vae, dtype)


def write_presets(out: Path, world: str) -> None:
    """Copy what is written by hand of the bundled model of a world: its presets and, if there is one, its notice."""
    for name in (presets.FILE, NOTICE):
        if (path := bundled_folder(world) / name).is_file():
            content = path.read_bytes()  # before writing: it may be the same file
            (out / name).write_bytes(content)


def write_unet(out: Path, sizes: Sizes, unet: State, dtype: torch.dtype) -> None:
    """Write the folder ``unet`` of a pipeline."""
    _write_json(out / "unet" / "config.json", _public_config(networks.unet(sizes).config))
    _write_tensors(out / "unet" / WEIGHTS, unet, dtype)


def _public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}


def _write_tensors(path: Path, state: State, dtype: torch.dtype) -> None:
    save_tensors(path, {key: v.to(dtype) if v.is_floating_point() else v for key, v in state.items()})


def write_half(path: Path, state: State) -> None:
    """Write a classifier or a contrastive pair in float16."""
    _write_tensors(path, state, torch.float16)


def write_clip(out: Path, tokens: Path, sizes: Sizes, text: State, pair: State) -> None:
    """Write a text encoder and its ``Pair`` as a folder that transformers' CLIPModel and CLIPProcessor load."""
    from transformers import CLIPConfig

    vocabulary = tokenizer(tokens)
    config = CLIPConfig(
        text_config=networks.text_config(sizes, len(vocabulary), vocabulary.bos_token_id, vocabulary.eos_token_id),
        vision_config=networks.vision_config(sizes),
        projection_dim=sizes.text_width,
    )
    shutil.copytree(tokens, out, dirs_exist_ok=True)
    content = {**json.loads(config.to_json_string(use_diff=False)), "architectures": ["CLIPModel"]}
    _write_json(out / "config.json", {key: value for key, value in content.items() if value is not None})
    half = {"do_resize": True, "size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 64}
    scaling = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_rescale": True}
    _write_json(
        out / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "resample": 3, **half, **scaling},
    )
    text = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    image = {key.removeprefix("image."): value for key, value in pair.items() if key.startswith("image.")}
    state = {**text, **image, "text_projection.weight": pair["text.weight"], "logit_scale": pair["log_scale"]}
    write_half(out / "model.safetensors", state)
