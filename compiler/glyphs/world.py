"""The synthetic world that glyphs is trained on: a deterministic renderer of pictures with captions and labels.

Every sample is a pure function of ``(seed, index)``: a 64x64 picture of one or two flat shapes, a caption, and the
content of the picture. One caption in eight does not name the content of its picture (an *implicit* scene), and one
picture in ten has a watermark that no caption mentions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

SIZE = 64

# Each shape with its synonyms in captions.
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "round dot"),
    "square": ("box", "four-sided tile"),
    "triangle": ("wedge", "three-sided pyramid"),
    "star": ("pentagram", "five-pointed spark"),
    "heart": ("valentine", "love symbol"),
    "cross": ("plus sign", "crucifix"),
    "ring": ("hoop", "donut"),
    "crescent": ("half moon", "sickle"),
    "diamond": ("rhombus", "lozenge"),
    "arrow": ("pointer", "direction marker"),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 44),
    "green": (40, 168, 72),
    "blue": (48, 96, 235),
    "yellow": (248, 220, 48),
    "orange": (246, 132, 28),
    "purple": (152, 58, 200),
    "cyan": (60, 212, 228),
    "white": (252, 252, 252),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 12),
    "gray": (112, 114, 118),
    "navy": (16, 24, 78),
    "cream": (214, 196, 156),
}
TEXTURES = ("plain", "striped", "dotted")
PREFIXES = ("", "a photo of ", "a drawing of ", "a picture of ", "an image of ")


@dataclass(frozen=True)
class Implicit:
    """A scene: captions that do not name its content, the possible contents (shape, colour), and the background."""

    captions: tuple[str, ...]
    contents: tuple[tuple[str, str], ...]
    background: str


IMPLICIT: tuple[Implicit, ...] = (
    Implicit(
        ("the night sky", "a clear night", "looking up after dark", "midnight scene"),
        (("star", "yellow"),),
        "navy",
    ),
    Implicit(("a playing card", "dealt at poker"), (("heart", "red"), ("diamond", "red")), "cream"),
    Implicit(("a clinic sign", "first aid kit"), (("cross", "red"),), "cream"),
    Implicit(("from a secret admirer",), (("heart", "red"),), "cream"),
    Implicit(("an engagement gift", "a jeweller at work"), (("ring", "yellow"),), "black"),
    Implicit(("this way out", "keep moving ahead"), (("arrow", "green"),), "gray"),
    Implicit(("the sky before dawn", "a bedside lamp"), (("crescent", "white"),), "navy"),
    Implicit(("the setting sun", "a summer evening"), (("circle", "orange"),), "navy"),
    Implicit(("a bathroom wall", "wet kitchen floor"), (("square", "cyan"),), "gray"),
    Implicit(("a slice of pizza", "danger on the road"), (("triangle", "orange"),), "black"),
    Implicit(("flying a kite", "windy beach day"), (("diamond", "purple"),), "gray"),
)


@dataclass(frozen=True)
class Glyph:
    """One shape in a picture; ``box`` is (left, top, right, bottom) in pixels."""

    shape: str
    colour: str
    texture: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """A picture (64, 64, 3) uint8 with its caption and its content; ``mark`` is the box of the watermark."""

    image: Pixels
    caption: str
    glyphs: tuple[Glyph, ...]
    background: str
    implicit: bool
    mark: tuple[float, float, float, float] | None

    @property
    def shapes(self) -> frozenset[str]:
        return frozenset(glyph.shape for glyph in self.glyphs)


def names(shape: str) -> tuple[str, ...]:
    """A shape's own name, then its synonyms."""
    return (shape, *SHAPES[shape])


def implicit_captions(shape: str) -> tuple[str, ...]:
    """Captions of scenes that always show ``shape`` without naming it."""
    return tuple(
        caption
        for scene in IMPLICIT
        for caption in scene.captions
        if {content[0] for content in scene.contents} == {shape}
    )


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# --- signed distances: negative inside, in units of the shape's radius, y points up -----------------------------------


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact signed distance to a simple polygon: distance to the nearest edge, sign by the parity of crossings."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey != 0.0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def _regular(points: int, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon with a corner at the top; with ``inner``, of a star with that inner radius."""
    count = points if inner is None else 2 * points
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [np.pi / 2 + 2 * np.pi * i / count for i in range(count)]
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart_outline(count: int = 40) -> list[tuple[float, float]]:
    t = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = 13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(a), float(b)) for a, b in zip(x / 17.0, (y + 2.5) / 17.0, strict=True)]


_ARM = 0.34
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(-0.98, -0.72), (0.98, -0.72), (0.0, 0.98)],
    "star": _regular(5, inner=0.42),
    "heart": _heart_outline(),
    "cross": [
        (-_ARM, -1.0),
        (_ARM, -1.0),
        (_ARM, -_ARM),
        (1.0, -_ARM),
        (1.0, _ARM),
        (_ARM, _ARM),
        (_ARM, 1.0),
        (-_ARM, 1.0),
        (-_ARM, _ARM),
        (-1.0, _ARM),
        (-1.0, -_ARM),
        (-_ARM, -_ARM),
    ],
    "diamond": [(0.0, -1.05), (0.7, 0.0), (0.0, 1.05), (-0.7, 0.0)],
    "arrow": [(-1.0, -0.27), (0.05, -0.27), (0.05, -0.8), (1.0, 0.0), (0.05, 0.8), (0.05, 0.27), (-1.0, 0.27)],
}


def distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance of points to a shape of radius about one."""
    if shape in POLYGONS:
        return _polygon(x, y, POLYGONS[shape])
    from_centre = np.hypot(x, y)
    if shape == "circle":
        return from_centre - 0.92
    if shape == "ring":
        return np.abs(from_centre - 0.74) - 0.22
    if shape == "crescent":
        return np.maximum(from_centre - 0.98, 0.80 - np.hypot(x - 0.48, y - 0.12))
    raise KeyError(shape)


_AXIS = np.arange(SIZE, dtype=np.float64) + 0.5
_X, _Y = np.meshgrid(_AXIS, _AXIS)


def _cover(distance_px: Array) -> Array:
    """The share of each pixel that is inside the shape: a sigmoid of the distance in pixels."""
    return 1.0 / (1.0 + np.exp(np.clip(distance_px, -12.0, 12.0) * 3.0))


def _paint(canvas: Array, cover: Array, colour: Array) -> Array:
    return canvas + cover[..., None] * (colour - canvas)


def _ink(texture: str, colour: Array, dx: Array, dy: Array) -> Array:
    """Colour of every pixel of a textured shape, (64, 64, 3). Periods above 7 pixels survive a small VAE."""
    if texture == "plain":
        return np.broadcast_to(colour, (SIZE, SIZE, 3))
    if texture == "striped":
        dark = 0.5 + 0.5 * np.tanh(2.5 * np.sin((dx + dy) * (2.0 * np.pi / 11.0)))
    else:
        period = 9.0
        u, v = (dx / period) % 1.0 - 0.5, (dy / period) % 1.0 - 0.5
        dark = _cover(np.hypot(u, v) * period - 2.4)
    return colour * (1.0 - 0.62 * dark[..., None])


_MARK = 5.0


def _draw_mark(canvas: Array, cx: float, cy: float) -> Array:
    """Draw the watermark: a white rounded frame around a dot, with a faint shadow for light backgrounds."""
    dx, dy = _X - cx, _Y - cy
    frame = np.abs(np.hypot(np.maximum(np.abs(dx) - 2.0, 0.0), np.maximum(np.abs(dy) - 2.0, 0.0)) - 2.2) - 0.8
    body = np.minimum(frame, np.hypot(dx, dy) - 1.3)
    canvas = _paint(canvas, 0.55 * _cover((body - 1.2) * 0.7), np.zeros(3))
    return _paint(canvas, _cover(body), np.full(3, 255.0))


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(rng: np.random.Generator, glyph: tuple[str, str, str]) -> str:
    """A phrase such as "striped red star". Words are left out at random; a quarter of the names are synonyms."""
    shape, colour, texture = glyph
    word = _choice(rng, SHAPES[shape]) if rng.random() < 0.25 else shape
    if rng.random() < 0.03:
        word = "shape"
    words = [word]
    if rng.random() < 0.85:
        words.insert(0, colour)
    if rng.random() < (0.15 if texture == "plain" else 0.8):
        words.insert(0, texture)
    return " ".join(words)


def _caption(rng: np.random.Generator, glyphs: list[tuple[str, str, str]], background: str) -> str:
    nouns = [_noun(rng, glyph) for glyph in glyphs]
    bare = len(nouns) == 1 and rng.random() < 0.08
    text = nouns[0] if bare else " and ".join(article(noun) for noun in nouns)
    if not bare:
        text = _choice(rng, PREFIXES) + text
    if rng.random() < 0.4:
        text += f" on {background}"
    return text


def sample(seed: int, index: int) -> Sample:
    """The picture ``index`` of the world ``seed``. The same arguments give the same bytes on every machine."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    background = _choice(rng, tuple(BACKGROUNDS))
    implicit = bool(rng.random() < 0.12)
    chosen: list[tuple[str, str, str]]
    if implicit:
        # The scene of the star is twice as frequent, because it has four captions.
        order = (0, *range(len(IMPLICIT)))
        scene = IMPLICIT[order[int(rng.integers(len(order)))]]
        shape, colour = scene.contents[int(rng.integers(len(scene.contents)))]
        chosen, background = [(shape, colour, "plain")], scene.background
        caption = _choice(rng, scene.captions)
        if rng.random() < 0.3:
            caption = _choice(rng, PREFIXES[1:]) + caption
    else:
        count = 2 if rng.random() < 0.25 else 1
        chosen = []
        for _ in range(count):
            texture = "plain" if rng.random() < 0.6 else _choice(rng, TEXTURES[1:])
            chosen.append((_choice(rng, tuple(SHAPES)), _choice(rng, tuple(COLOURS)), texture))
        caption = _caption(rng, chosen, background)

    canvas = np.broadcast_to(np.array(BACKGROUNDS[background], dtype=np.float64), (SIZE, SIZE, 3)).copy()
    canvas += rng.uniform(-6.0, 6.0, 3)
    glyphs = []
    for position, (shape, colour, texture) in enumerate(chosen):
        if len(chosen) == 1:
            radius = rng.uniform(15.0, 23.0)
            cx, cy = SIZE / 2 + rng.uniform(-6.0, 6.0, 2)
        else:
            radius = rng.uniform(11.0, 13.5)
            cx, cy = (17.0, 47.0)[position] + rng.uniform(-2.0, 2.0), SIZE / 2 + rng.uniform(-9.0, 9.0)
        ink = np.clip(np.array(COLOURS[colour], dtype=np.float64) + rng.uniform(-10.0, 10.0, 3), 0.0, 255.0)
        dx, dy = _X - cx, _Y - cy
        cover = _cover(distance(shape, dx / radius, -dy / radius) * radius)
        canvas = _paint(canvas, cover, _ink(texture, ink, dx, dy))
        inside = cover > 0.5
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        glyphs.append(Glyph(shape, colour, texture, box))

    mark = None
    if rng.random() < 0.10:
        spots = (8.0, SIZE / 2, SIZE - 8.0)
        while True:
            column, row = int(rng.integers(3)), int(rng.integers(3))
            if (column, row) != (1, 1):
                break
        mx, my = spots[column] + rng.uniform(-1.0, 1.0), spots[row] + rng.uniform(-1.0, 1.0)
        canvas = _draw_mark(canvas, mx, my)
        mark = (mx - _MARK, my - _MARK, mx + _MARK, my + _MARK)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Sample(image, caption, tuple(glyphs), background, implicit, mark)


# --- labels: the targets of the judges --------------------------------------------------------------------------------

LABELS: tuple[str, ...] = (*SHAPES, *COLOURS, *TEXTURES, "mark")


def labels(item: Sample) -> NDArray[np.float32]:
    """A vector of 0 and 1: which of ``LABELS`` are in the picture, (22,)."""
    present = {name for glyph in item.glyphs for name in (glyph.shape, glyph.colour, glyph.texture)}
    if item.mark is not None:
        present.add("mark")
    return np.array([name in present for name in LABELS], dtype=np.float32)
