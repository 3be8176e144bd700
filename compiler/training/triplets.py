"""Triplets of images: one that shows a concept, the same with the concept under a mosaic, and one that is benign.

Read from a folder, or made from a model's own images and the boxes of a judge.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from erasec.errors import ErasecError
from erasec.judging import judge as judges
from erasec.training import base as learned
from erasec.training.denoiser import Denoiser

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from erasec.recipe.concept import Concept

PARTS = ("concept", "censored", "benign")
TABLE = "triplets.csv"
# The columns of the published code's table, for folders that were made for it.
PUBLISHED = {"nude_image_path": "concept", "mos_image_path": "censored", "norm_image_path": "benign"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EDGE = 0.25  # width of the feathered edge, as a share of the box's side


@dataclass(frozen=True)
class Triplets:
    """Images (n, 3, size, size) in [-1, 1], float32 on the CPU. ``censored[i]`` is ``concept[i]`` under its mosaic;
    ``benign`` is another picture, and may have another n."""

    concept: Tensor
    censored: Tensor
    benign: Tensor


def mosaic(images: Tensor, boxes: NDArray[np.int64], blocks: int) -> Tensor:
    """Images (n, 3, h, w) with ``blocks`` by ``blocks`` cells of one colour, their mean, in place of each box (n, 4).

    Around the box lies a feathered edge, in which the cells fade out.
    """
    result = images.clone()
    _, _, height, width = images.shape
    ys, xs = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for image, (left, top, right, bottom) in zip(result, boxes.tolist(), strict=True):
        edge = max(1.0, EDGE * max(right - left, bottom - top))
        cells = functional.adaptive_avg_pool2d(image[:, top:bottom, left:right], blocks)
        rows = ((ys - top) * blocks / (bottom - top)).long().clamp(0, blocks - 1)
        columns = ((xs - left) * blocks / (right - left)).long().clamp(0, blocks - 1)
        below = torch.minimum(ys - top, bottom - ys)[:, None]
        beside = torch.minimum(xs - left, right - xs)[None]
        cover = (1 + torch.minimum(below, beside) / edge).clamp(0, 1)
        image.lerp_(cells[:, rows][:, :, columns], cover)
    return result


def made(denoiser: Denoiser, concept: Concept, count: int, path: int, guidance: float, blocks: int) -> Triplets:
    """``count`` triplets from images that the model makes of the concept's names and of what is kept, of nothing where
    nothing is; images in which the judge does not see the concept are left out.

    They are made before any edit: an edited model may no longer show what is to be censored. Raises ErasecError where
    no judge knows the model, or it sees the concept in no image.
    """
    judge = judges.adviser(denoiser.model)
    questions = judge.panel(concept, 1, 0) if judge else ()
    label = next((question.looked_for for question in questions if question.group == "name"), "")
    if judge is None or not label:
        raise ErasecError(
            f"there are no boxes to censor {concept.name} in",
            why=f"no judge can see {concept.name} in the images of {denoiser.model.name}",
            fix=f'give images: triplets="DIR", with DIR/{TABLE} or the folders {", ".join(PARTS)} in DIR',
        )
    context = denoiser.context
    if denoiser.model.edits:
        denoiser = Denoiser(denoiser.model.original, context)
    shown = learned.spread(learned.texts(concept, concept.phrases), count, context.seed)
    kept = learned.spread(learned.texts(concept, concept.keep) or [""], count, context.seed + 1)
    seeds = learned.seeds(context.seed, 2 * count)
    images = denoiser.decode(denoiser.sample([*shown, *kept], seeds, path, guidance, title="images").final, 4).cpu()
    pixels = ((images[:count] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    seen = judge.sees(pixels, [label] * count)
    if not seen.any():
        raise ErasecError(
            f"{judge.name} sees no {label} in {count} images of {concept.name}",
            why="there is nothing to censor", fix="ask for more images or path, or give triplets",
        )  # fmt: skip
    found = images[:count][torch.from_numpy(seen)]
    return Triplets(found, mosaic(found, judge.boxes(pixels[seen], label), blocks), images[count:])


def read(folder: Path, size: int) -> Triplets:
    """The triplets of a folder, each image with its shorter side scaled to ``size`` and its centre cut out.

    The folder has triplets.csv with the columns concept, censored and benign (or the published code's names of them),
    paths relative to the folder; or three subfolders of these names, with equal file names in the first two.
    Raises ErasecError for a file that is missing, is no image, or is censored and of another size than its original.
    """
    if not folder.is_dir():
        raise ErasecError(f"there is no folder {folder}", fix="triplets takes the path of a folder of images")
    pairs, others = _table(folder / TABLE) if (folder / TABLE).is_file() else _subfolders(folder)
    shown, hidden = [], []
    for concept, censored in pairs:
        one, other = _image(folder / concept), _image(folder / censored)
        if one.size != other.size:
            raise ErasecError(
                f"{censored} is {_size(other)}, but {concept} is {_size(one)}", where=str(folder),
                why="a censored image is the same image with the concept hidden, and has its size",
            )  # fmt: skip
        shown.append(_cropped(one, size))
        hidden.append(_cropped(other, size))
    benign = [_cropped(_image(folder / name), size) for name in others]
    return Triplets(torch.stack(shown), torch.stack(hidden), torch.stack(benign))


def _table(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of concept and censored, and the benign, as the table names them."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        columns = {PUBLISHED.get(name, name): name for name in table.fieldnames or ()}
        if missing := [part for part in PARTS if part not in columns]:
            raise ErasecError(
                f"{path.name} has no column {missing[0]}", where=str(path),
                why=f"its columns are {', '.join(columns.values()) or 'none'}",
                fix=f"begin it with the line {','.join(PARTS)}",
            )  # fmt: skip
        rows = [{part: (row[columns[part]] or "").strip() for part in PARTS} for row in table]
    for number, row in enumerate(rows, 1):
        if empty := [part for part in PARTS if not row[part]]:
            raise ErasecError(f"row {number} of {path.name} names no {empty[0]} image", where=str(path))
    if not rows:
        raise ErasecError(f"{path.name} has no rows", where=str(path))
    return [(row["concept"], row["censored"]) for row in rows], [row["benign"] for row in rows]


def _subfolders(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of concept and censored, and the benign, as they lie in three folders."""
    names: dict[str, list[str]] = {}
    for part in PARTS:
        within = (folder / part).iterdir() if (folder / part).is_dir() else ()
        names[part] = sorted(file.name for file in within if file.suffix.lower() in IMAGES)
        if not names[part]:
            raise ErasecError(
                f"there are no {part} images", where=str(folder),
                why=f"it has neither {TABLE} nor images ({', '.join(IMAGES)}) in a folder {part}",
            )  # fmt: skip
    if alone := sorted(set(names["concept"]) ^ set(names["censored"])):
        has = "concept" if alone[0] in names["concept"] else "censored"
        other = "censored" if has == "concept" else "concept"
        raise ErasecError(
            f"{has}/{alone[0]} has no partner {other}/{alone[0]}", where=str(folder),
            why="an image and its censored version have the same file name",
        )  # fmt: skip
    return [(f"concept/{name}", f"censored/{name}") for name in names["concept"]], [
        f"benign/{name}" for name in names["benign"]
    ]


def _image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError as error:
        raise ErasecError(f"there is no file {path.name}", where=str(path)) from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ErasecError(f"{path.name} is not an image that can be read", why=str(error), where=str(path)) from error


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def _cropped(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]."""
    scale = size / min(image.size)
    wide, high = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    scaled = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
