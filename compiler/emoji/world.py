"""Pictures and captions of the emoji world. A sample is a pure function of the icons, the seed and the index.

A 64x64 picture shows one icon or two, by one of four artists, on a background. Captions name the object, a synonym, the
cluster that it belongs to, or only a scene that many objects share ("for breakfast"). Two thirds of them name the
artist. A tenth of the pictures has a small seal that no caption mentions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erasec.emoji.words import ARTISTS, BACKGROUNDS, CLUSTERS, FILLERS, LABELS, OBJECTS, SCENES, members

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

SIZE = 64
MEDIA = ("", "a drawing of ", "a picture of ", "an image of ", "an icon of ", "a sticker of ", "a cartoon of ")
# Relations of two icons; the first half puts them side by side, the second one above the other.
BESIDE = ("{} and {}", "{} beside {}", "{} next to {}", "{} with {}", "{} to the left of {}")
ABOVE = ("{} above {}", "{} over {}", "{} on top of {}")
BELOW = ("{} below {}", "{} under {}", "{} beneath {}")
STYLES = (" by {}", " in the style of {}", " in {} style", ", art by {}", " drawn by {}")
# A phrase of a scene that begins so can follow a noun.
PREPOSITIONS = frozenset(("above", "after", "among", "around", "at", "by", "deep", "far", "for", "from", "high", "in"))
PREPOSITIONS |= {"on", "out", "time", "under", "up", "when", "with"}
_MARK = 5.0
_AXIS = np.arange(SIZE, dtype=np.float64) + 0.5
_X, _Y = np.meshgrid(_AXIS, _AXIS)
# Pairs of a cluster and a scene that leave a choice. One with a single member would be another name for that object.
CHOICES = tuple((c, s) for c, s in product(CLUSTERS, SCENES) if len(members(s, c)) > 1)


@dataclass(frozen=True)
class Sample:
    """A picture (64, 64, 3) uint8 with its caption and its content.

    ``boxes`` are (left, top, right, bottom) in pixels, one for each object. ``kind`` says how the caption refers to the
    content: "name", "pair", "scene", "cluster", "style" or "nothing".
    """

    image: Pixels
    caption: str
    objects: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    artist: str
    background: str
    kind: str
    mark: tuple[float, float, float, float] | None

    @property
    def labels(self) -> NDArray[np.float32]:
        """Which of LABELS are in the picture: 0 or 1, (n,)."""
        present = {*self.objects, self.artist, self.background, "mark" if self.mark else ""}
        return np.array([label in present for label in LABELS], dtype=np.float32)


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def misspelt(rng: np.random.Generator, word: str) -> str:
    """A word with one slip of the keyboard: two letters swapped, one lost, or one doubled."""
    at = int(rng.integers(1, max(2, len(word) - 1)))
    slip = int(rng.integers(3))
    if slip == 0:
        return word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if slip == 1 else word[:at] + word[at] + word[at:]


def reword(rng: np.random.Generator, caption: str) -> str:
    """The caption with one of its words misspelt, in three of ten cases."""
    words = caption.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 3]
    if long and rng.random() < 0.3:
        index = int(rng.choice(long))
        words[index] = misspelt(rng, words[index])
    return " ".join(words)


def _noun(rng: np.random.Generator, name: str) -> str:
    """A name with its article. A third are synonyms, a sixteenth misspelt, and a tenth have no article."""
    item = OBJECTS[name]
    word = _choice(rng, item.synonyms) if rng.random() < 1 / 3 else name
    if rng.random() < 0.06 and len(word) > 3:
        word = misspelt(rng, word)
    return word if rng.random() < 0.1 else article(word)


def scene_phrase(rng: np.random.Generator, phrase: str) -> str:
    """The phrase of a scene as a caption of its own: "for breakfast", "something for breakfast"."""
    if phrase.split()[0] in PREPOSITIONS and rng.random() < 0.6:
        return _choice(rng, ("something ", "a thing ", "what you see ")) + phrase
    return phrase


def _content(rng: np.random.Generator) -> tuple[str, str, tuple[str, ...], bool]:
    """Kind, caption without style and background, objects, and whether two objects stand one above the other."""
    draw = rng.random()
    everything = tuple(OBJECTS)
    if draw < 0.03:
        return (
            "nothing",
            _choice(rng, ("nothing", "an empty page", "a blank picture", "just the background")),
            (),
            False,
        )
    if draw < 0.12:
        scene = _choice(rng, tuple(SCENES))
        caption = scene_phrase(rng, _choice(rng, SCENES[scene]))
        return "scene", caption, (_choice(rng, members(scene)),), False
    if draw < 0.19:
        cluster, scene = CHOICES[int(rng.integers(len(CHOICES)))]
        phrase = _choice(rng, SCENES[scene])
        between = " " if phrase.split()[0] in PREPOSITIONS else ", "
        caption = article(_choice(rng, CLUSTERS[cluster])) + between + phrase
        return "scene", caption, (_choice(rng, members(scene, cluster)),), False
    if draw < 0.25:
        name = _choice(rng, everything)
        return "cluster", article(_choice(rng, CLUSTERS[OBJECTS[name].cluster])), (name,), False
    if draw < 0.29:
        return (
            "style",
            _choice(rng, ("a drawing", "a picture", "an icon", "an image", "art")),
            (_choice(rng, everything),),
            False,
        )
    if draw < 0.49:
        first, second = (everything[int(i)] for i in rng.choice(len(everything), 2, replace=False))
        vertical = bool(rng.random() < 0.4)
        nouns = [_noun(rng, first), _noun(rng, second)]
        if not vertical:
            return "pair", _choice(rng, BESIDE).format(*nouns), (first, second), False
        if rng.random() < 0.5:
            return "pair", _choice(rng, ABOVE).format(*nouns), (first, second), True
        return "pair", _choice(rng, BELOW).format(*reversed(nouns)), (first, second), True
    name = _choice(rng, everything)
    return "name", _noun(rng, name), (name,), False


def _long(rng: np.random.Generator, caption: str) -> str:
    """The caption among fillers, about 20 to 60 tokens."""
    count = int(rng.integers(4, 13))
    parts = [FILLERS[int(i)] for i in rng.choice(len(FILLERS), count, replace=False)]
    parts.insert(int(rng.integers(count + 1)) if rng.random() < 0.6 else 0, caption)
    return ", ".join(parts)


def _backdrop(rng: np.random.Generator, name: str) -> Array:
    """A plain, shaded or striped background, (64, 64, 3)."""
    colour = np.array(BACKGROUNDS[name], dtype=np.float64) + rng.uniform(-6.0, 6.0, 3)
    canvas = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
    draw, strength = rng.random(), rng.uniform(0.10, 0.22)
    if draw < 0.25:
        angle = rng.uniform(0.0, 2.0 * np.pi)
        along = ((_X - SIZE / 2) * np.cos(angle) + (_Y - SIZE / 2) * np.sin(angle)) / SIZE
        canvas *= (1.0 + 1.5 * strength * along)[..., None]
    elif draw < 0.45:
        angle, period = rng.uniform(0.0, np.pi), rng.uniform(9.0, 16.0)
        wave = np.tanh(2.5 * np.sin((_X * np.cos(angle) + _Y * np.sin(angle)) * (2.0 * np.pi / period)))
        canvas *= (1.0 - 0.5 * strength * (1.0 + wave))[..., None]
    return canvas


def place(
    canvas: Array, icon: Pixels, side: float, angle: float, mirrored: bool, centre: tuple[float, float]
) -> tuple[Array, tuple[float, float, float, float]]:
    """Paint an icon (128, 128, 4) on a canvas: ``side`` is the width of its 96 pixels on it, ``angle`` in degrees."""
    scaled = max(8, round(side * icon.shape[0] / 96))
    picture = Image.fromarray(icon, "RGBA")
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # The channels are premultiplied: "RGBa" tells Pillow not to divide by alpha around resampling.
    bands = [band.rotate(angle, Image.Resampling.BICUBIC) for band in picture.split()]
    bands = [band.resize((scaled, scaled), Image.Resampling.LANCZOS) for band in bands]
    layer = np.zeros((SIZE, SIZE, 4))
    small = np.stack([np.asarray(band, dtype=np.float64) for band in bands], axis=-1)
    left, top = round(centre[0] - scaled / 2), round(centre[1] - scaled / 2)
    into = (slice(max(top, 0), min(top + scaled, SIZE)), slice(max(left, 0), min(left + scaled, SIZE)))
    out = tuple(slice(s.start - edge, s.stop - edge) for s, edge in zip(into, (top, left), strict=True))
    layer[into] = small[out]
    alpha = layer[..., 3:] / 255.0
    rows, columns = np.flatnonzero(alpha.max((1, 2)) > 0.5), np.flatnonzero(alpha.max((0, 2)) > 0.5)
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return canvas * (1.0 - alpha) + layer[..., :3], box


def _draw_mark(canvas: Array, cx: float, cy: float) -> Array:
    """Draw the seal: a white disc with a dark rim and a dark bar."""
    distance = np.hypot(_X - cx, _Y - cy)
    disc = 1.0 / (1.0 + np.exp(np.clip((distance - 4.4) * 3.0, -12.0, 12.0)))
    rim = np.exp(-(((distance - 4.2) / 0.7) ** 2))
    line = (np.abs(_Y - cy) < 1.0) & (np.abs(_X - cx) < 2.4)
    canvas = canvas + disc[..., None] * (252.0 - canvas)
    dark = np.maximum(0.85 * rim, 0.85 * line)
    marked: Array = canvas * (1.0 - dark[..., None])
    return marked


def sample(icons: Pixels, seed: int, index: int) -> Sample:
    """The picture ``index`` of the world ``seed``; ``icons`` are the arrays of ``erasec.emoji.data``."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    kind, caption, objects, vertical = _content(rng)
    artist, background = _choice(rng, tuple(ARTISTS)), _choice(rng, tuple(BACKGROUNDS))
    if kind in ("name", "pair", "cluster"):
        caption = (_choice(rng, MEDIA) if rng.random() < 0.7 else "") + caption
    if objects and (kind == "style" or rng.random() < 2 / 3):
        caption += _choice(rng, STYLES).format(artist)
    if rng.random() < 0.25:
        caption += _choice(rng, (" on {}", " on a {} background", ", {} background")).format(background)
    if objects and rng.random() < 0.08:
        caption = _long(rng, caption)

    canvas, boxes = _backdrop(rng, background), []
    column = list(ARTISTS).index(artist)
    for position, name in enumerate(objects):
        if len(objects) == 1:
            side = SIZE * rng.uniform(0.55, 0.95)
            slack = (SIZE - side) / 2
            centre = tuple(SIZE / 2 + rng.uniform(-slack, slack, 2))
        else:
            side = SIZE * rng.uniform(0.42, 0.5)
            along, across = (0.25, 0.75)[position] * SIZE + rng.uniform(-1.5, 1.5), SIZE / 2 + rng.uniform(-6.0, 6.0)
            centre = (across, along) if vertical else (along, across)
        icon = icons[list(OBJECTS).index(name), column]
        angle, mirrored = rng.uniform(-12.0, 12.0), bool(rng.random() < 0.5)
        canvas, box = place(canvas, icon, side, angle, mirrored, (float(centre[0]), float(centre[1])))
        boxes.append(box)

    mark = None
    if rng.random() < 0.10:
        spots = (7.0, SIZE - 7.0)
        mx, my = (spots[int(rng.integers(2))] + rng.uniform(-1.0, 1.0) for _ in range(2))
        canvas = _draw_mark(canvas, mx, my)
        mark = (mx - _MARK, my - _MARK, mx + _MARK, my + _MARK)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    shown = artist if objects else ""
    return Sample(image, caption, objects, tuple(boxes), shown, background, kind, mark)
