"""Pictures that show a concept without being asked to, and where: read from a folder, or made and looked through."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from erasec.errors import ErasecError
from erasec.judging import judge as judges
from erasec.training import base as learned

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser

TABLE = "boxes.csv"
SIDES = ("left", "top", "right", "bottom")
CONFIDENT = 0.5  # boxes of which a detector is less sure are passed over
NEAR = 1e-6  # what rounding may move an edge by, in cells

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height


@dataclass(frozen=True)
class Marked:
    """Latents (n, c, h, w) of pictures on the CPU with their captions, and the boxes in each; a clean one has none."""

    latents: Tensor
    captions: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


def covered(boxes: Sequence[Box], rows: int, columns: int, slack: float = NEAR) -> Tensor:
    """The cells of a grid that boxes touch, bool (rows, columns).

    An edge that reaches less than ``slack`` of a cell's width or height into it does not count, unless the box then
    touched no cell. A box that ends where a cell begins does not touch that.
    """
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        cells[_span(top * rows, bottom * rows, slack), _span(left * columns, right * columns, slack)] = True
    return cells


def _span(begin: float, end: float, slack: float) -> slice:
    first, last = int(begin + slack), ceil(end - slack)
    return slice(first, last) if first < last else slice(int(begin + NEAR), ceil(end - NEAR))


def made(denoiser: Denoiser, concept: Concept, count: int, path: int, guidance: float, seed: int) -> Marked:
    """``count`` of the model's own pictures, and where a judge sees the concept in them.

    What has no name that works, a mark, is looked for in pictures of what is kept; all else in those of its names too.
    Raises ErasecError where no judge knows the model or the concept.
    """
    judge = judges.adviser(denoiser.model)
    asked = judge.panel(concept, 1, seed) if judge else ()
    label = next((question.looked_for for question in asked if question.group != "keep"), "")
    if judge is None or not label:
        raise ErasecError(
            f"there are no boxes that say where {concept.name} is",
            why=f"no judge can see {concept.name} in the pictures of {denoiser.model.name}",
            fix=f'give pictures with the boxes that a detector found: boxes="DIR", with DIR/{TABLE}',
        )
    prompts = learned.spread(["", *learned.texts(concept, concept.keep)], count, seed)
    if concept.kind != "mark":
        prompts[::2] = learned.spread(learned.texts(concept, concept.phrases), len(prompts[::2]), seed)
    latents = denoiser.sample(prompts, learned.seeds(seed, count), path, guidance, title="pictures").final
    parts = []
    for part in latents.split(16):
        pictures = denoiser.decode(part).permute(0, 2, 3, 1).cpu()
        parts.append(((pictures + 1) * 127.5).round().to(torch.uint8).numpy())
    images = np.concatenate(parts)
    seen = np.flatnonzero(judge.sees(images, [label] * count))
    boxes: list[tuple[Box, ...]] = [()] * count
    for row, box in zip(seen.tolist(), judge.boxes(images[seen], label).tolist(), strict=True):
        boxes[row] = (_shares(box, (images.shape[2], images.shape[1])),)
    return Marked(latents, tuple(prompts), tuple(boxes))


def read(folder: Path, denoiser: Denoiser) -> Marked:
    """The pictures that ``folder/boxes.csv`` names, as latents, each with its shorter side scaled to the model's size
    and its centre cut out.

    The table's columns are file, left, top, right, bottom (pixels, the last two exclusive; all empty for a clean
    picture), and if known caption and confidence, of which less than 0.5 makes a box not count. A file with several
    boxes has several rows. Raises ErasecError that names the row or file at fault.
    """
    table = folder / TABLE
    size = denoiser.size
    pictures, captions, boxes = [], [], []
    for name, lines in _table(table).items():
        try:
            with Image.open(folder / name) as opened:
                image = opened.convert("RGB")
        except FileNotFoundError as error:
            raise ErasecError(f"there is no picture {name}", why=f"{TABLE} names it", where=str(folder)) from error
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ErasecError(f"{name} is not an image that can be read", why=str(error), where=str(folder)) from error
        pictures.append(_cropped(image, size))
        captions.append(next((caption for caption, _ in lines if caption), ""))
        found = (_inside(box, image.size) for _, box in lines if box is not None)
        boxes.append(tuple(box for box in found if box is not None))
    return Marked(denoiser.encode(torch.stack(pictures)).cpu(), tuple(captions), tuple(boxes))


def _table(path: Path) -> dict[str, list[tuple[str, tuple[float, ...] | None]]]:
    """Captions and boxes in pixels by file, None where a row has none that counts."""
    if not path.is_file():
        raise ErasecError(
            f"there is no {path}", fix=f"boxes takes a folder of pictures and their {TABLE}: file,{','.join(SIDES)}"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        columns = table.fieldnames or ()
        if missing := [name for name in ("file", *SIDES) if name not in columns]:
            raise ErasecError(
                f"{path.name} has no column {missing[0]}", why=f"its columns are {', '.join(columns) or 'none'}",
                fix=f"begin it with the line file,{','.join(SIDES)}", where=str(path),
            )  # fmt: skip
        found: dict[str, list[tuple[str, tuple[float, ...] | None]]] = {}
        for number, row in enumerate(table, 1):
            line = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str | None)}
            if not line["file"]:
                raise ErasecError(f"row {number} of {path.name} names no file", where=str(path))
            found.setdefault(line["file"], []).append((line.get("caption", ""), _box(line, number, path)))
    if not found:
        raise ErasecError(f"{path.name} has no rows", where=str(path))
    return found


def _box(line: Mapping[str, str], number: int, path: Path) -> tuple[float, ...] | None:
    told = [line[side] for side in SIDES]
    if not any(told):
        return None
    try:
        left, top, right, bottom = (float(value) for value in told)
        sure = float(line.get("confidence") or 1.0)
        right_way = left < right and top < bottom and all(map(isfinite, (left, top, right, bottom, sure)))
    except ValueError:
        right_way = False
    if not right_way:
        raise ErasecError(
            f"row {number} of {path.name} has no box", why=f"it says {', '.join(value or 'nothing' for value in told)}",
            fix="left < right and top < bottom, in pixels; all four empty for a clean picture", where=str(path),
        )  # fmt: skip
    return (left, top, right, bottom) if sure >= CONFIDENT else None


def _inside(box: Sequence[float], size: tuple[int, int]) -> Box | None:
    """A box in pixels as shares of the square in the middle of a picture of ``size``; None where it lies outside."""
    side = min(size)
    left, top = ((length - side) / 2 for length in size)
    shares = _shares([box[0] - left, box[1] - top, box[2] - left, box[3] - top], (side, side))
    return shares if shares[0] < shares[2] and shares[1] < shares[3] else None


def _shares(box: Sequence[float], size: tuple[int, int]) -> Box:
    left, top, right, bottom = (min(max(edge / size[at % 2], 0.0), 1.0) for at, edge in enumerate(box))
    return left, top, right, bottom


def _cropped(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    found = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(found)).permute(2, 0, 1).float() / 127.5 - 1.0
