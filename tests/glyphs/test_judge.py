"""The judge of glyphs finds where a shape is."""

from __future__ import annotations

import numpy as np
import pytest

from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


@pytest.mark.parametrize("label", ["star", "heart", "ring"])
def test_boxes_lie_where_the_shape_is(label: str) -> None:
    """Among renders with two shapes or one: on the shape itself, and not on the other."""
    samples = [world.sample(977, index) for index in range(600)]
    samples = [s for s in samples if sum(glyph.shape == label for glyph in s.glyphs) == 1][:12]
    boxes = GlyphJudge("a").boxes(np.stack([sample.image for sample in samples]), label)
    assert boxes.shape == (12, 4)
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= world.SIZE
    own, others = [], []
    for box, sample in zip(boxes.tolist(), samples, strict=True):
        for glyph in sample.glyphs:
            (own if glyph.shape == label else others).append(overlap(box, glyph.box))
    assert np.mean(own) > 0.5
    assert others
    assert np.mean(others) < 0.2


def test_no_images_have_no_boxes() -> None:
    assert GlyphJudge("a").boxes(np.zeros((0, 64, 64, 3), dtype=np.uint8), "star").shape == (0, 4)
