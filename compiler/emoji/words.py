"""The names of the emoji world: objects, clusters of neighbours, scenes and artists, from ``objects.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each artist's name in captions, with the icon set of the pictures.
ARTISTS: dict[str, str] = {"Noto": "noto", "Twemoji": "twemoji", "Fluent": "fluent-emoji-flat", "Blob": "noto-v1"}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (140, 142, 148),
    "navy": (28, 38, 92),
    "green": (70, 150, 84),
    "pink": (238, 168, 192),
    "cream": (238, 222, 172),
}
# What the twin has never seen: one object among close neighbours, and one artist.
LEFT_OUT = ("owl", "Noto")


@dataclass(frozen=True)
class Object:
    """A thing that pictures show. ``icon`` is its name in the icon sets, ``scenes`` are keys of ``SCENES``."""

    name: str
    icon: str
    cluster: str
    synonyms: tuple[str, ...]
    scenes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, then its synonyms."""
        return (self.name, *self.synonyms)


_CONTENT: dict[str, Any] = tomllib.loads((Path(__file__).parent / "objects.toml").read_text(encoding="utf-8"))
FILLERS: tuple[str, ...] = tuple(_CONTENT.pop("fillers"))
SCENES: dict[str, tuple[str, ...]] = {name: tuple(phrases) for name, phrases in _CONTENT.pop("scenes").items()}
CLUSTERS: dict[str, tuple[str, ...]] = {name: tuple(words) for name, words in _CONTENT.pop("clusters").items()}
OBJECTS: dict[str, Object] = {
    name: Object(name, row.get("icon", name.replace(" ", "-")), cluster, tuple(row["synonyms"]), tuple(row["scenes"]))
    for cluster, rows in _CONTENT.items()
    for name, row in rows.items()
}
# What a judge can see in a picture.
LABELS: tuple[str, ...] = (*OBJECTS, *ARTISTS, *BACKGROUNDS, "mark")


def neighbours(name: str) -> tuple[str, ...]:
    """The other objects of the same cluster."""
    return tuple(o.name for o in OBJECTS.values() if o.cluster == OBJECTS[name].cluster and o.name != name)


def members(scene: str, cluster: str = "") -> tuple[str, ...]:
    """The objects of a scene; with ``cluster``, only those of that cluster."""
    return tuple(o.name for o in OBJECTS.values() if scene in o.scenes and cluster in ("", o.cluster))
