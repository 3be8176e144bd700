"""The judge of glyphs finds where a shape is."""

from __future__ import annotations

import numpy as np
import pytest

from erasec.glyphs import world
from erasec.glyphs.judging import GlyphJudge


def overlap(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


@pytest.mark.parametrize("label", ["star", "heart", "ring"])
def test_boxes_lie_where_the_shape_is(label: str) -> None:
    """Among renders with two shapes or one: on the shape itself, and not on the other."""
    samples = [world.sample(977, index) for index in range(600)]
    samples = [s for s in samples if sum(glyph.shape == label for glyph in s.glyphs) == 1][:12]
    found = GlyphJudge("a").boxes(np.stack([sample.image for sample in samples]), label)
    assert found.shape == (12, 4)
    assert (found[:, :2] < found[:, 2:]).all()
    assert found.min() >= 0
    assert found.max() <= world.SIZE
    own, others = [], []
    for box, sample in zip(found.tolist(), samples, strict=True):
        for glyph in sample.glyphs:
            (own if glyph.shape == label else others).append(overlap(box, glyph.box))
    assert np.mean(own) > 0.5
    assert others
    assert np.mean(others) < 0.2


def test_no_images_have_no_boxes() -> None:
    assert GlyphJudge("a").boxes(np.zeros((0, 64, 64, 3), dtype=np.uint8), "star").shape == (0, 4)
