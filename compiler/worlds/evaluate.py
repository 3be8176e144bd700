"""What the evaluations of the reference worlds share: pictures of a bundled model, digests, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erasec.attention.pipeline import Sampling, generate
from erasec.checkpoint.safetensors import atomic_write, file_digest

if TYPE_CHECKING:
    from erasec.base import Images

GAP = 4  # pixels between the pictures of a contact sheet


def digests(weights: Path) -> dict[str, str]:
    """sha256 of every file of weights below a folder; a test compares them with those beside the figures."""
    root = weights.resolve()
    return {path.relative_to(root).as_posix(): file_digest(path) for path in sorted(root.rglob("*.safetensors"))}


def pictures(folder: Path, prompts: Sequence[str], seed: int, sampling: Sampling) -> Images:
    """Pictures of a model (n, 64, 64, 3); the seed of the i-th prompt is 1000003 ``seed`` + i."""
    return generate(folder, prompts, [seed * 1_000_003 + i for i in range(len(prompts))], sampling, folder.name)


def write_sheet(path: Path, rows: Images) -> None:
    """Write pictures (rows, columns, h, w, 3) as one PNG."""
    from PIL import Image

    count, columns, height, width, _ = rows.shape
    shape = (count * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
            sheet[top : top + height, left : left + width] = image
    with atomic_write(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG", optimize=True)
