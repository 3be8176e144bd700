"""Priors: what a crowd of captions looks like to the cross-attention, as one Gram that closed-form passes keep still.

A Gram of d x d numbers stands for any number of captions: the solver needs no more of them (methods that ship cached
projections for every layer ship the same matrix many times over).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint.safetensors import file_digest, read_header, read_tensor, save
from erasec.closed_form import solver as closed_form
from erasec.errors import ErasecError, nearest
from erasec.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

    from erasec.model.view import Model

COLUMNS = ("prompt", "caption", "text")
BATCH = 64
SUFFIX = ".prior.safetensors"


def captions(path: Path) -> list[str]:
    """The captions of a text file, one a line, or of a CSV file with a column prompt, caption or text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() != ".csv":
                found = [line.strip() for line in stream]
            else:
                rows = csv.DictReader(stream)
                names = rows.fieldnames or []
                column = next((name for name in COLUMNS if name in names), None)
                if column is None:
                    raise ErasecError(
                        f"{path.name} has no column of captions", where=str(path),
                        why=f"its columns are {', '.join(names)}; one of {', '.join(COLUMNS)} is needed",
                    )  # fmt: skip
                found = [(row[column] or "").strip() for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ErasecError(f"the captions {path} cannot be read", why=str(error)) from error
    if not (found := [caption for caption in found if caption]):
        raise ErasecError(f"{path.name} holds no captions", where=str(path))
    return found


def build(model: Model, texts: list[str]) -> dict[str, Tensor]:
    """The mean Gram of all token states of the captions, (d, d) float64, by stream; one batch is held at a time."""
    grams: dict[str, Tensor] = {}
    for stream in model.streams:
        total, count = None, 0
        with bar(f"prior {stream}", len(texts)) as advance:
            for batch in _batches(texts):
                rows = model.encode(batch, stream).states.flatten(0, 1)
                part = closed_form.gram(rows)
                total, count = part if total is None else total + part, count + len(rows)
                advance(len(batch))
        assert total is not None
        grams[stream] = total / count
    return grams


def _batches(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def write(path: Path, model: Model, file: Path) -> int:
    """Build the prior of a caption file for a model's text encoders, save it, and say how many captions it holds.

    Raises ErasecError, before any caption is encoded, where ``path`` exists or cannot be written.
    """
    path = path.expanduser()
    if path.exists():
        raise ErasecError(f"{path} exists", fix="give a path that does not exist yet: --out FILE")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ErasecError(
            f"the prior {path} cannot be written", fix="give a file in a folder that is there: --out FILE",
            why=f"{path.parent} {'may not be written' if path.parent.is_dir() else 'is no folder'}",
        )  # fmt: skip
    texts = captions(file)
    told = {
        "erasec.prior": "1", "family": model.family.name, "encoders": _encoders(model), "captions": str(len(texts)),
        "captions.sha256": file_digest(file),
    }  # fmt: skip
    save(path, build(model, texts), told)
    return len(texts)


def read(name: str, model: Model, stream: str) -> Tensor:
    """Rows (r, d) whose Gram is the prior's. Raises ErasecError where it was built with other text encoders."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ErasecError(f"there is no prior {name}", fix=f"erasec prior {model.name} CAPTIONS.txt --out {name}")
    entries, told = read_header(path)
    if "erasec.prior" not in told:
        raise ErasecError(f"{path.name} is no prior", why="its metadata says nothing of one", where=str(path),
                          fix=f"erasec prior {model.name} CAPTIONS.txt --out coco{SUFFIX}")  # fmt: skip
    if told["encoders"] != _encoders(model):
        raise ErasecError(
            f"the prior {path.name} was built with other text encoders, or the same ones stored otherwise",
            why=f"its family is {told['family']}", where=str(path),
            fix=f"build it again: erasec prior {model.name} CAPTIONS.txt --out {path.name}",
        )  # fmt: skip
    if stream not in entries:
        raise ErasecError(f"the prior {path.name} has no {stream!r}", why=nearest(stream, entries), where=str(path))
    return closed_form.root(read_tensor(entries[stream]))


def _encoders(model: Model) -> str:
    return " ".join(model.component_digest(name)[:16] for name in model.family.text_encoders)
