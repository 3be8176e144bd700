"""The networks of the reference worlds: the classes of Stable Diffusion 1 at a small size, and two classifiers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

    from erasec.worlds.base import Sizes

POSITIONS = 77
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    # DPM-Solver++ reaches the hit rates of DDIM with half the steps.
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "leading",
}


def train_bpe(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train CLIP's byte-level BPE on ``captions``. Returns (vocabulary, merges); ``</w>`` marks the end of a word."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)

    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    # CLIP's order: bytes, bytes at the end of a word, merges, the two special tokens. It covers every text.
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    known = set(entries)
    entries += [joined for joined in dict.fromkeys(left + right for left, right in merges) if joined not in known]
    entries += [START, END]
    return {entry: index for index, entry in enumerate(entries)}, merges


def text_config(sizes: Sizes, vocabulary: int, start: int, end: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "quick_gelu",
        "projection_dim": sizes.text_width,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def text_encoder(sizes: Sizes, vocabulary: int, start: int, end: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**text_config(sizes, vocabulary, start, end)))


def vision_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "projection_dim": sizes.text_width,
    }


def vision_tower(sizes: Sizes) -> CLIPVisionModelWithProjection:
    """The image half of transformers' CLIPModel: a vision transformer on patches of 8 pixels, and its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_config(sizes)))


def vae(sizes: Sizes) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def alphas_cumprod() -> Tensor:
    """The share of the signal's variance that is left at each timestep, (1000,)."""
    start, end, count = (SCHEDULER[key] for key in ("beta_start", "beta_end", "num_train_timesteps"))
    return torch.cumprod(1.0 - torch.linspace(start**0.5, end**0.5, count) ** 2, 0)


def unet(sizes: Sizes) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    # Four heads. Eight heads, as in Stable Diffusion, would have eight channels each and be a third slower on a CPU.
    return UNet2DConditionModel(
        sample_size=sizes.latent_side,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,
    )


class Plain(nn.Module):
    """Classifier A: four strided convolutions. (n, 3, 64, 64) in [-1, 1] -> (n, outputs)."""

    def __init__(self, outputs: int, widths: tuple[int, ...], hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        flat = widths[-1] * (64 >> len(widths)) ** 2
        self.head = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(images).flatten(1)))  # type: ignore[no-any-return]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Classifier B: residual blocks and global pooling. (n, 3, 64, 64) in [-1, 1] -> (n, outputs)."""

    def __init__(self, outputs: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            nn.Conv2d(3, first, 7, stride=4, padding=3),
            _Residual(first),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            _Residual(second),
            nn.Conv2d(second, third, 3, stride=2, padding=1),
            _Residual(third),
            nn.GELU(),
        )
        self.head = nn.Linear(2 * third, outputs)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1))  # type: ignore[no-any-return]


def classifier(which: str, sizes: Sizes, outputs: int) -> nn.Module:
    """Classifier "a" or "b", untrained: images (n, 3, 64, 64) in [-1, 1] -> logits (n, outputs)."""
    if which == "a":
        return Plain(outputs, sizes.judge_a, sizes.judge_hidden, dropout=0.3)
    first, second, third = sizes.judge_b
    return Residual(outputs, (first, second, third))


class Pair(nn.Module):
    """A contrastive pair (CLIP): image network, text projection and temperature, on top of a world's text encoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.image = Plain(sizes.text_width, sizes.pair) if sizes.pair else vision_tower(sizes)
        self.text = nn.Linear(sizes.text_width, sizes.text_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def images(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, (n, width)."""
        features = self.image(images)
        return nn.functional.normalize(features if isinstance(features, Tensor) else features.image_embeds, dim=-1)

    def texts(self, pooled: Tensor) -> Tensor:
        """Text embeddings of unit length from pooled text states, (n, width)."""
        return nn.functional.normalize(self.text(pooled), dim=-1)
