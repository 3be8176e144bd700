"""Draws pictures before and after an edit as two rows of one PNG, for the first pages of the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, BETWEEN, LEFT, TOP = 4, 12, 56, 24


def draw(path: Path, groups: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], side: int) -> None:
    """Write the pairs (before, after) of each group below its title; every picture is ``side`` pixels wide."""
    width = LEFT + sum(len(pairs) * (side + GAP) + BETWEEN for pairs in groups.values())
    sheet = Image.new("RGB", (width, TOP + 2 * (side + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, word in enumerate(("before", "after")):
        pen.text((4, TOP + row * (side + GAP) + side // 2 - 8), word, "black", font)
    x = LEFT
    for title, pairs in groups.items():
        pen.text((x, 4), title, "black", font)
        for pair in pairs:
            for row, image in enumerate(pair):
                tile = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(tile, (x, TOP + row * (side + GAP)))
            x += side + GAP
        x += BETWEEN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
