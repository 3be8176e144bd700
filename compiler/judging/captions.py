"""Caption files: captions of everyday scenes, whose pictures show what an edit keeps.

``captions.csv`` has 200 captions, which were written for this project: people in clothes, animals, food, streets,
rooms, landscapes, vehicles and sports, without written text in the picture and without any bundled concept.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from erasec.documents import read_captions
from erasec.judging.prompt_files import digest, sample

# Of fewer captions, CMMD and KID have intervals that are wider than what edits change.
LEAST = 200
DEFAULT = Path(str(resources.files("erasec.judging"))) / "captions.csv"


@dataclass(frozen=True)
class CaptionFile:
    """The captions of a file that a build uses. ``name`` is the file's, ``digest`` its sha256, and ``total`` the number
    of captions in it."""

    name: str
    digest: str
    total: int
    captions: tuple[str, ...]


def load(path: Path, limit: int, seed: int) -> CaptionFile:
    """The captions of a text file, one per line, or of a CSV file with a column prompt, caption or text, such as
    COCO-30k of MACE (Lu et al., 2024). Seeds in the file are not used.

    Of more than ``limit`` captions, a sample that depends on ``seed`` alone. Raises ErasecError.
    """
    captions = read_captions(path)
    return CaptionFile(path.name, digest(path), len(captions), tuple(sample(captions, limit, seed)))
