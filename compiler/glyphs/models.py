"""The networks of glyphs: the classes of Stable Diffusion 1 at a small size, and the classifiers of its judge."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erasec.glyphs.world import LABELS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

WIDTH = 128
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


def train_bpe(captions: Iterable[str], size: int = 1000) -> tuple[dict[str, int], list[tuple[str, str]]]:
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


def text_encoder(vocabulary: int, start: int, end: int) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        hidden_act="quick_gelu",
        projection_dim=WIDTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    # Four heads. Eight heads, as in Stable Diffusion, would have eight channels each and be a third slower on a CPU.
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


class Plain(nn.Module):
    """Classifier A: four strided convolutions. (n, 3, 64, 64) in [-1, 1] -> (n, outputs)."""

    def __init__(self, outputs: int, widths: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        flat = widths[-1] * (64 >> len(widths)) ** 2
        self.head = nn.Sequential(nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, outputs))

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

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=4, padding=3),
            _Residual(32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            _Residual(64),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            _Residual(128),
            nn.GELU(),
        )
        self.head = nn.Linear(256, outputs)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1))  # type: ignore[no-any-return]


def classifier(which: str) -> nn.Module:
    """Classifier "a" or "b", untrained: images (n, 3, 64, 64) in [-1, 1] -> logits of LABELS, (n, 22)."""
    return Plain(len(LABELS), (32, 64, 96, 128), dropout=0.3) if which == "a" else Residual(len(LABELS))


class Pair(nn.Module):
    """A contrastive pair (CLIP): image network, text projection and temperature, on top of glyphs' text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Plain(WIDTH, (32, 48, 64, 96))
        self.text = nn.Linear(WIDTH, WIDTH, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def images(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, (n, 128)."""
        return nn.functional.normalize(self.image(images), dim=-1)

    def texts(self, pooled: Tensor) -> Tensor:
        """Text embeddings of unit length from pooled text states, (n, 128)."""
        return nn.functional.normalize(self.text(pooled), dim=-1)
