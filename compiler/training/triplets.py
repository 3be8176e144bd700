"""Triplets of images: one that shows a concept, the same with the concept under a mosaic, and one that is benign.

They are read from a folder, or made from images of the model and the boxes of a judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from erasec.documents import read_csv
from erasec.errors import ErasecError
from erasec.selection import no_tuning_judge, tuning_judge
from erasec.training import banks
from erasec.training.denoiser import Denoiser
from erasec.training.images import read_image, to_pixels, to_square_tensor

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from erasec.recipe.concept import Concept

PARTS = ("concept", "censored", "benign")
TABLE = "triplets.csv"
# Columns of the table that the published code reads, so that folders made for it can be used.
PUBLISHED = {"nude_image_path": "concept", "mos_image_path": "censored", "norm_image_path": "benign"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EDGE = 0.25  # width of the feathered edge as a fraction of the longer side of the box
DECODE_BATCH = 4  # latents that the VAE decodes at once


@dataclass(frozen=True)
class Triplets:
    """Images (n, 3, size, size) in [-1, 1], float32 on the CPU. ``censored[i]`` is ``concept[i]`` under its mosaic.
    ``benign`` are other images, and their number may be another one."""

    concept: Tensor
    censored: Tensor
    benign: Tensor


def mosaic(images: Tensor, boxes: NDArray[np.int64], cells: int) -> Tensor:
    """Images (n, 3, h, w) with each box (n, 4) replaced by ``cells`` by ``cells`` cells of its mean colours.

    The mosaic fades out over a feathered edge around the box.
    """
    result = images.clone()
    _, _, height, width = images.shape
    ys, xs = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for image, (left, top, right, bottom) in zip(result, boxes.tolist(), strict=True):
        edge = max(1.0, EDGE * max(right - left, bottom - top))
        colours = functional.adaptive_avg_pool2d(image[:, top:bottom, left:right], cells)
        rows = ((ys - top) * cells / (bottom - top)).long().clamp(0, cells - 1)
        columns = ((xs - left) * cells / (right - left)).long().clamp(0, cells - 1)
        depth_y = torch.minimum(ys - top, bottom - ys)[:, None]
        depth_x = torch.minimum(xs - left, right - xs)[None]
        opacity = (1 + torch.minimum(depth_y, depth_x) / edge).clamp(0, 1)
        image.lerp_(colours[:, rows][:, :, columns], opacity)
    return result


def generate_triplets(
    denoiser: Denoiser, concept: Concept, count: int, sample_steps: int, guidance: float, cells: int
) -> Triplets:
    """At most ``count`` triplets from images that the model samples; the mosaic has ``cells`` by ``cells`` cells.

    Prompts of the concept give the first two images, prompts of its kept phrases the benign ones (the empty prompt, if
    it has none). Images of the concept in which the judge does not see it are left out. All are sampled from the
    original model: after an edit it may no longer show the concept. Raises ErasecError where no judge can judge the
    model, the judge has no label for the concept, or it sees the concept in no image.
    """
    judge = tuning_judge(denoiser.model, concept, denoiser.context.judges)
    questions = judge.panel(concept, 1, 0) if judge else ()
    label = next((question.looked_for for question in questions if question.group == "name"), "")
    if judge is None or not label:
        raise ErasecError(
            f"there are no boxes to censor {concept.name} in",
            why=no_tuning_judge(denoiser.model, concept, denoiser.context.judges),
            fix=f'give images: triplets="DIR", with DIR/{TABLE} or the folders {", ".join(PARTS)} in DIR',
        )
    context = denoiser.context
    if denoiser.model.edits:
        denoiser = Denoiser(denoiser.model.original, context)
    erase = banks.spread_prompts(banks.concept_prompts(concept, concept.phrases), count, context.seed)
    keep = banks.spread_prompts(banks.concept_prompts(concept, concept.keep) or [""], count, context.seed + 1)
    seeds = banks.training_seeds(context.seed, 2 * count)
    latents = denoiser.sample([*erase, *keep], seeds, sample_steps, guidance, title="images").final
    images = denoiser.decode(latents, DECODE_BATCH).cpu()
    pixels = to_pixels(images[:count])
    seen = judge.sees(pixels, [label] * count)
    if not seen.any():
        raise ErasecError(
            f"{judge.title} sees no {label} in {count} images of {concept.name}",
            why="there is nothing to censor",
            fix="raise images or sample_steps, or give triplets",
        )
    shown = images[:count][torch.from_numpy(seen)]
    return Triplets(shown, mosaic(shown, judge.boxes(pixels[seen], label), cells), images[count:])


def read_triplets(folder: Path, size: int) -> Triplets:
    """The triplets of a folder, the centre square of each image scaled to ``size``.

    The folder has a table triplets.csv with the columns concept, censored and benign (or the published code's names for
    them) of paths relative to the folder; or three subfolders of these names, with equal file names in the first two.
    Raises ErasecError for a file that is missing or not an image, and for a censored image that differs in size from
    its original.
    """
    if not folder.is_dir():
        raise ErasecError(f"there is no folder {folder}", fix="give triplets the path of a folder of images")
    table = folder / TABLE
    pairs, benign_names = _read_table(table) if table.is_file() else _list_subfolders(folder)
    listed_in = TABLE if table.is_file() else ""
    originals, mosaics = [], []
    for original_name, censored_name in pairs:
        original, censored = (
            read_image(folder / original_name, listed_in),
            read_image(folder / censored_name, listed_in),
        )
        if original.size != censored.size:
            raise ErasecError(
                f"{censored_name} is {_format_size(censored)}, but {original_name} is {_format_size(original)}",
                where=str(folder),
                why="a censored image must have the size of its original",
            )
        originals.append(to_square_tensor(original, size))
        mosaics.append(to_square_tensor(censored, size))
    benign = [to_square_tensor(read_image(folder / name, listed_in), size) for name in benign_names]
    return Triplets(torch.stack(originals), torch.stack(mosaics), torch.stack(benign))


def _read_table(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of concept and censored image, and the benign images, as the table lists them."""
    table = read_csv(path)
    columns = {PUBLISHED.get(name, name): name for name in table.columns}
    if missing := [part for part in PARTS if part not in columns]:
        raise ErasecError(
            f"{path.name} has no column {missing[0]}",
            where=str(path),
            why=f"its columns are {', '.join(columns.values()) or 'none'}",
            fix=f"begin it with the line {','.join(PARTS)}",
        )
    rows = [{part: row[columns[part]] for part in PARTS} for row in table.rows]
    for number, row in enumerate(rows, 1):
        if empty := [part for part in PARTS if not row[part]]:
            raise ErasecError(f"row {number} of {path.name} names no {empty[0]} image", where=str(path))
    if not rows:
        raise ErasecError(f"{path.name} has no rows", where=str(path))
    return [(row["concept"], row["censored"]) for row in rows], [row["benign"] for row in rows]


def _list_subfolders(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of concept and censored image, and the benign images, as they lie in three folders."""
    names: dict[str, list[str]] = {}
    for part in PARTS:
        files = (folder / part).iterdir() if (folder / part).is_dir() else ()
        names[part] = sorted(file.name for file in files if file.suffix.lower() in SUFFIXES)
        if not names[part]:
            raise ErasecError(
                f"there are no {part} images",
                where=str(folder),
                why=f"it has neither {TABLE} nor images ({', '.join(SUFFIXES)}) in a folder {part}",
            )
    if unpaired := sorted(set(names["concept"]) ^ set(names["censored"])):
        present, missing = ("concept", "censored") if unpaired[0] in names["concept"] else ("censored", "concept")
        raise ErasecError(
            f"{present}/{unpaired[0]} has no partner {missing}/{unpaired[0]}",
            where=str(folder),
            why="an image and its censored version must have the same file name",
        )
    pairs = [(f"concept/{name}", f"censored/{name}") for name in names["concept"]]
    return pairs, [f"benign/{name}" for name in names["benign"]]


def _format_size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
