"""Small pipelines of sd3 and flux with random weights, built from the libraries' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from erasec.ldm.skeleton import write_tokenizer
from erasec.model import loading

WORDS = ("a", "an", "photo", "drawing", "image", "of", "on", "navy", "star", "circle", "square", "heart")


def t5_tokenizer(length: int) -> Any:
    """T5's tokenizer with a vocabulary of whole words, and of letters for all others."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("a"), ord("z") + 1)), *(f"▁{word}" for word in WORDS)]
    scores = [0.0] * 3 + [-9.0] * 27 + [-2.0] * len(WORDS)
    return transformers.T5Tokenizer(list(zip(tokens, scores, strict=True)), extra_ids=0, model_max_length=length)


def clip(width: int, kind: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=855,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=853,
        eos_token_id=854,
        pad_token_id=854,
        initializer_factor=4.0,
    )
    return kind(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=42, d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def pipeline(family: str, levels: int = 1) -> Any:
    """A pipeline of "sd3", "sd3-no-t5", "flux" (which reads the scale of its guidance) or "flux-schnell" (which does
    not), with a VAE of so many ``levels``: a latent is 2 ** (levels - 1) pixels wide."""
    torch.manual_seed(0)
    words = transformers.CLIPTokenizer.from_pretrained(loading.bundled_folder("glyphs") / "tokenizer")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    shape: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 48}
    if family.startswith("flux"):
        transformer: Any = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=family == "flux",
            **shape,
        )
        return diffusers.FluxPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=clip(16, transformers.CLIPTextModel),
            tokenizer=words,
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(512),
        )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        **shape,
    )
    kind = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        text_encoder=clip(16, kind),
        tokenizer=words,
        text_encoder_2=clip(24, kind),
        tokenizer_2=words,
        text_encoder_3=None if family == "sd3-no-t5" else t5(),
        tokenizer_3=None if family == "sd3-no-t5" else t5_tokenizer(256),
    )


def save_original(family: str, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the folder of a small model with random weights and all that the published models have beside their sizes:
    CLIP's vocabulary, and the settings that no tensor shows. "sd35" has no T5, as the smaller published files."""
    _original(family).to(dtype).save_pretrained(out)
    index = json.loads((out / "model_index.json").read_text())
    pads = ("<|endoftext|>",) if family == "flux" else ("<|endoftext|>", "!")
    # transformers' own files of CLIP's tokenizer take seconds to make, and to read.
    for name, pad in zip(("tokenizer", "tokenizer_2"), pads, strict=False):
        write_tokenizer(out / name, pad)
        index[name] = ["transformers", "CLIPTokenizer"]
    (out / "model_index.json").write_text(json.dumps(index))


def _original(family: str) -> Any:
    """The pipeline of ``save_original``, without CLIP's tokenizers."""
    torch.manual_seed(0)
    flux = family == "flux"
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        scaling_factor=0.3611 if flux else 1.5305,
        shift_factor=0.1159 if flux else 0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128, d_model=80, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    kind = transformers.CLIPTextModel if flux else transformers.CLIPTextModelWithProjection
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": whole_clip(kind, 32, "quick_gelu"),
        "tokenizer": None,
    }
    if flux:
        return diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(
                num_layers=2,
                num_single_layers=2,
                num_attention_heads=1,
                joint_attention_dim=80,
                pooled_projection_dim=32,
                guidance_embeds=True,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer(512),
            **parts,
        )
    parts["text_encoder"].text_projection.weight.data = torch.eye(32)
    later = family == "sd35"
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=3,
            num_attention_heads=1,
            joint_attention_dim=80,
            caption_projection_dim=64,
            pooled_projection_dim=80,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1) if later else (),
            qk_norm="rms_norm" if later else None,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=whole_clip(kind, 48, "gelu"),
        tokenizer_2=None,
        text_encoder_3=None if later else t5,
        tokenizer_3=None if later else t5_tokenizer(256),
        **parts,
    )


def whole_clip(kind: Any, width: int, activation: str) -> Any:
    """A small text encoder of CLIP with all of its vocabulary."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=64,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act=activation,
        initializer_factor=4.0,
    )
    return kind(config)
