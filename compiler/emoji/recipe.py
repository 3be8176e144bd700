"""How the emoji world is trained: ``python -m erasec.worlds.train emoji --data DIR``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from erasec.emoji.words import CLUSTERS, LABELS, LEFT_OUT, OBJECTS
from erasec.emoji.world import reword, sample
from erasec.errors import ErasecError
from erasec.worlds.base import Picture, Sizes, World

SIZES = Sizes(
    vocabulary=2600,
    text_width=192,
    vae_channels=(32, 64, 64),
    unet_channels=(64, 128, 224),
    judge_a=(32, 64, 128, 192),
    judge_b=(48, 96, 192),
    judge_hidden=256,
    pair=(),
)


def world(data: Path | None) -> World:
    """The emoji world with the icons of ``data``, the folder that ``erasec.emoji.data`` wrote."""
    if data is None or not (data / "icons.npy").is_file():
        raise ErasecError(
            "the emoji world has no pictures yet",
            why=f"there is no icons.npy in {data}" if data else "the folder of its icons was not given",
            fix="render them with python -m erasec.emoji.data, and give the folder with --data",
        )
    icons = np.load(data / "icons.npy", mmap_mode="r")
    clusters = list(CLUSTERS)

    def picture(seed: int, index: int) -> Picture:
        item = sample(icons, seed, index)
        group = clusters.index(OBJECTS[item.objects[0]].cluster) if item.objects else len(clusters)
        return Picture(item.image, item.caption, item.labels, group)

    return World(
        name="emoji",
        labels=LABELS,
        picture=picture,
        sizes=SIZES,
        twin="emoji-never-owl-noto",
        left_out=LEFT_OUT,
        images=48_000,
        judge_images=40_000,
        steps={
            "text": 3000,
            "vae": 2800,
            "decoder": 1500,
            "unet": 36000,
            "twin": 20000,
            "judge-a": 3000,
            "judge-b": 3000,
        },
        hard_negatives=True,
        spread=0.05,
        garbage=0.1,
        redrawn=0.7,
        reword=reword,
        unet_batches=(32, 32),
    )
