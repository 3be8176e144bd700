"""Images with the boxes of a concept: read from a folder, or sampled from the model and annotated by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from erasec.documents import read_csv
from erasec.errors import ErasecError
from erasec.model.cuts import summarise_cuts
from erasec.progress import note
from erasec.selection import no_tuning_judge, tuning_judge
from erasec.training import banks
from erasec.training.images import read_image, to_pixels, to_square_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.recipe.concept import Concept
    from erasec.training.denoiser import Denoiser

TABLE = "boxes.csv"
EDGES = ("left", "top", "right", "bottom")
MIN_CONFIDENCE = 0.5  # boxes of a lower confidence are ignored
ROUNDING = 1e-6  # in cells: an edge that reaches less far into a cell lies there by rounding alone
DECODE_BATCH = 16  # latents that the VAE decodes at once

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of width and height


@dataclass(frozen=True)
class AnnotatedImages:
    """Images as latents (n, c, h, w) on the CPU, with a caption and the boxes of each. An image without the concept has
    no boxes."""

    latents: Tensor
    captions: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


def covered_cells(boxes: Sequence[Box], rows: int, columns: int, slack: float = ROUNDING) -> Tensor:
    """The cells of a grid that boxes touch, bool (rows, columns).

    An edge that reaches less than ``slack`` of a cell's width or height into it does not touch it, unless the box would
    then touch no cell. A box that ends where a cell begins does not touch that cell.
    """
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        cells[_span(top * rows, bottom * rows, slack), _span(left * columns, right * columns, slack)] = True
    return cells


def _span(begin: float, end: float, slack: float) -> slice:
    """The cells of one axis that an interval touches."""
    first, last = int(begin + slack), ceil(end - slack)
    return slice(first, last) if first < last else slice(int(begin + ROUNDING), ceil(end - ROUNDING))


def generate_annotated_images(
    denoiser: Denoiser, concept: Concept, count: int, sample_steps: int, guidance: float, seed: int
) -> AnnotatedImages:
    """``count`` images sampled from the model, with the box of the concept where the judge for tuning sees it.

    Half of the prompts name the concept, and half do not. For a concept of the kind "mark" no prompt names it: the
    model draws a mark unprompted, and no prompt calls for it. Raises ErasecError where no judge can judge the model, or
    the judge has no label for the concept.
    """
    judge = tuning_judge(denoiser.model, concept, denoiser.context.judges)
    questions = judge.panel(concept, 1, seed) if judge else ()
    label = next((question.looked_for for question in questions if question.group != "keep"), "")
    if judge is None or not label:
        raise ErasecError(
            f"there are no boxes that say where {concept.name} is",
            why=no_tuning_judge(denoiser.model, concept, denoiser.context.judges),
            fix=f'give images and the boxes that a detector found in them: boxes="DIR", with DIR/{TABLE}',
        )
    prompts = banks.spread_prompts(["", *banks.concept_prompts(concept, concept.keep)], count, seed)
    if concept.kind != "mark":
        prompts[::2] = banks.spread_prompts(banks.concept_prompts(concept, concept.phrases), len(prompts[::2]), seed)
    seeds = banks.training_seeds(seed, count)
    latents = denoiser.sample(prompts, seeds, sample_steps, guidance, title="images").final
    pixels = np.concatenate([to_pixels(denoiser.decode(part)) for part in latents.split(DECODE_BATCH)])
    shown = np.flatnonzero(judge.sees(pixels, [label] * count))
    boxes: list[tuple[Box, ...]] = [()] * count
    for row, box in zip(shown.tolist(), judge.boxes(pixels[shown], label).tolist(), strict=True):
        boxes[row] = (_as_fractions(box, (pixels.shape[2], pixels.shape[1])),)
    return AnnotatedImages(latents, tuple(prompts), tuple(boxes))


def read_annotated_images(folder: Path, denoiser: Denoiser) -> AnnotatedImages:
    """The images that ``folder/boxes.csv`` lists, as latents of their centre squares at the model's size.

    The columns of the table are file, left, top, right and bottom, in pixels, the last two exclusive; and optionally
    caption and confidence. An image with several boxes has several rows; the row of an image without the concept has
    no edges. Boxes of a confidence below 0.5 are ignored. Raises ErasecError that names the row or file at fault.
    """
    squares, captions, boxes = [], [], []
    for name, rows in _read_table(folder / TABLE).items():
        image = read_image(folder / name, listed_in=TABLE)
        squares.append(to_square_tensor(image, denoiser.size))
        captions.append(next((caption for caption, _ in rows if caption), ""))
        in_square = (_in_centre_square(box, image.size) for _, box in rows if box is not None)
        boxes.append(tuple(box for box in in_square if box is not None))
    if cuts := summarise_cuts(captions, denoiser.model):
        note(f"captions of {TABLE}: {cuts}")
    return AnnotatedImages(denoiser.encode(torch.stack(squares)).cpu(), tuple(captions), tuple(boxes))


def _read_table(path: Path) -> dict[str, list[tuple[str, Box | None]]]:
    """Caption and box in pixels of every row, by file. The box is None where a row has none, or one that is ignored."""
    if not path.is_file():
        raise ErasecError(
            f"there is no {path}", fix=f"give a folder of images with a table {TABLE}: file,{','.join(EDGES)}"
        )
    columns, rows = read_csv(path)
    if missing := [name for name in ("file", *EDGES) if name not in columns]:
        raise ErasecError(
            f"{path.name} has no column {missing[0]}",
            why=f"its columns are {', '.join(columns) or 'none'}",
            fix=f"begin it with the line file,{','.join(EDGES)}",
            where=str(path),
        )
    rows_by_file: dict[str, list[tuple[str, Box | None]]] = {}
    for number, row in enumerate(rows, 1):
        if not row["file"]:
            raise ErasecError(f"row {number} of {path.name} names no file", where=str(path))
        rows_by_file.setdefault(row["file"], []).append((row.get("caption", ""), _parse_box(row, number, path)))
    if not rows_by_file:
        raise ErasecError(f"{path.name} has no rows", where=str(path))
    return rows_by_file


def _parse_box(row: Mapping[str, str], number: int, path: Path) -> Box | None:
    """The box of a row in pixels; None where all its edges are empty, or its confidence is too low."""
    texts = [row[edge] for edge in EDGES]
    if not any(texts):
        return None
    try:
        left, top, right, bottom = (float(text) for text in texts)
        confidence = float(row.get("confidence") or 1.0)
        valid = left < right and top < bottom and all(map(isfinite, (left, top, right, bottom, confidence)))
    except ValueError:
        valid = False
    if not valid:
        raise ErasecError(
            f"row {number} of {path.name} has no valid box",
            why=f"its edges are {', '.join(text or 'empty' for text in texts)}",
            fix="write pixels with left < right and top < bottom, or leave all four empty for an image without it",
            where=str(path),
        )
    return (left, top, right, bottom) if confidence >= MIN_CONFIDENCE else None


def _in_centre_square(box: Box, size: tuple[int, int]) -> Box | None:
    """A box in pixels of an image of ``size``, as fractions of its centre square; None where it lies outside."""
    side = min(size)
    left, top = ((length - side) / 2 for length in size)
    inside = _as_fractions([box[0] - left, box[1] - top, box[2] - left, box[3] - top], (side, side))
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


def _as_fractions(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box in pixels as fractions of an image of ``size``, cut off at its edges."""
    left, top, right, bottom = (min(max(edge / size[axis % 2], 0.0), 1.0) for axis, edge in enumerate(box))
    return left, top, right, bottom
