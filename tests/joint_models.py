"""Small pipelines of sd3 and flux with random weights, built from the libraries' own classes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

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
