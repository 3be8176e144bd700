"""How glyphs is trained: ``python -m erasec.worlds.train glyphs``."""

from __future__ import annotations

from pathlib import Path

from erasec.glyphs.world import LABELS, labels, sample
from erasec.worlds.base import Picture, Sizes, World

SIZES = Sizes(
    vocabulary=1000,
    text_width=128,
    vae_channels=(16, 32, 64, 64),
    unet_channels=(64, 128, 192),
    judge_a=(32, 64, 96, 128),
    judge_b=(32, 64, 128),
    judge_hidden=128,
    pair=(32, 48, 64, 96),
)


def picture(seed: int, index: int) -> Picture:
    item = sample(seed, index)
    return Picture(item.image, item.caption, labels(item))


def world(data: Path | None = None) -> World:
    return World(
        name="glyphs",
        labels=LABELS,
        picture=picture,
        sizes=SIZES,
        twin="glyphs-never-star",
        left_out=("star",),
        images=40_000,
        judge_images=40_000,
        steps={
            "text": 1200,
            "vae": 3000,
            "decoder": 1000,
            "unet": 2400,
            "twin": 2400,
            "judge-a": 3000,
            "judge-b": 3000,
        },
    )
