"""Reads prompt files: CSV files of prompts that show a concept, in the layouts that papers on erasure publish.

A file is recognised by its columns:

* I2P (Schramowski et al., 2023) and the nudity prompts of UnlearnDiffAtk: ``prompt``, ``categories`` (several, with
  commas), a seed and a guidance scale for each prompt, and numbers by judges of the authors.
* UnlearnDiffAtk (Zhang et al., 2024), objects and styles: ``case_number``, ``prompt``, ``evaluation_seed``,
  ``evaluation_guidance``, for styles ``artist``.
* Ring-A-Bell (Tsai et al., 2024): ``prompt``, ``case_number``, ``evaluation_seed``; its copy in later papers has
  ``sensitive prompt``. MMA-Diffusion (Yang et al., 2024) has ``adv_prompt``.
* MACE (Lu et al., 2024): ``type`` ("erased" or "others"), ``prompt``, ``evaluation_seed``, for styles ``artist``.
* ESD (Gandikota et al., 2023), styles: ``case_number``, ``prompt``, ``evaluation_seed``, ``artist``.

This module imports neither torch nor NumPy, because plans read the files.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from erasec.documents import read_csv
from erasec.errors import ErasecError, shown, suggestion

T = TypeVar("T")

PROMPTS = ("prompt", "sensitive prompt", "adv_prompt")
SEEDS = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance")
CATEGORIES = ("categories", "category", "type", "artist")  # the first that a file has is used
# Columns that say nothing about how to make a picture. The size of pictures is the model's.
UNUSED = (
    "",
    "Unnamed: 0",
    "case_number",
    "source",
    "hard",
    "inappropriate_percentage",
    "nudity_percentage",
    "q16_percentage",
    "sd_safety_percentage",
    "prompt_toxicity",
    "lexica_url",
    "sd_image_width",
    "sd_image_height",
    "sd_model",
    "target_prompt",
    "sanitized_adv_prompt",
    "success_against_sanitization_defense",
    "clean_prompt",
)
MOST_CATEGORIES, LONGEST_CATEGORY, LONGEST_PROMPT = 64, 64, 4000
SEED = re.compile(r"(\d{1,19})(?:\.0)?")  # programs that write tables turn whole numbers into "41.0"


@dataclass(frozen=True)
class PromptRow:
    """A prompt, with the seed and the guidance scale of its picture if the file has them, and its categories."""

    prompt: str
    categories: tuple[str, ...] = ()
    seed: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class PromptFile:
    """The rows of a prompt file that a build uses. ``name`` is the file's without its suffix, ``digest`` its sha256,
    and ``total`` the number of rows in it."""

    name: str
    digest: str
    total: int
    rows: tuple[PromptRow, ...]


def load(path: Path, limit: int, seed: int) -> PromptFile:
    """The prompt file at ``path``. Of more than ``limit`` rows, a sample that depends on ``seed`` alone.

    Raises ErasecError as ``read_prompts`` does.
    """
    rows = read_prompts(path)
    return PromptFile(path.stem, digest(path), len(rows), tuple(sample(rows, limit, seed)))


def sample(rows: Sequence[T], limit: int, seed: int) -> Sequence[T]:
    """``rows`` if they are at most ``limit``; otherwise a random choice of that many, in their order."""
    if len(rows) <= limit:
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def digest(path: Path) -> str:
    """sha256 of a file that has been read before."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_prompts(path: Path) -> tuple[PromptRow, ...]:
    """Every row of a prompt file. Rows whose cells are all empty are left out.

    Raises ErasecError for a file that cannot be read or has no rows, for a column that is missing, unknown or there
    twice, and for a value that is no seed, guidance scale, category or prompt.
    """
    columns, rows = read_csv(path)
    known = (*PROMPTS, *SEEDS, *GUIDANCE, *CATEGORIES, *UNUSED)
    fix = "name the columns prompt, category, seed and guidance; all but the first may be left out"
    if "coco_id" in columns:
        raise ErasecError(
            f"{path.name} has captions of COCO",
            why="captions show what is kept, and no concept is looked for in their pictures",
            where=str(path),
            fix=f"give it as captions: --captions {path}",
        )
    if unknown := [name for name in columns if name not in known]:
        near = suggestion(unknown[0], [name for name in known if name])
        why = f"the layouts of I2P, UnlearnDiffAtk, Ring-A-Bell, MACE and ESD have no such column; {near}"
        raise ErasecError(f"{path.name} has a column {shown(unknown[0])}", why=why, where=str(path), fix=fix)
    if twice := [name for name in columns if name not in UNUSED and columns.count(name) > 1]:
        raise ErasecError(f"{path.name} has two columns {twice[0]!r}", where=str(path), fix=fix)
    prompt, seed, guidance, category = (
        next((name for name in names if name in columns), None) for names in (PROMPTS, SEEDS, GUIDANCE, CATEGORIES)
    )
    if not prompt:
        why = f"its columns are {', '.join(filter(None, columns)) or 'none'}"
        raise ErasecError(f"{path.name} has no column of prompts", why=why, where=str(path), fix=fix)
    result = []
    for number, row in enumerate(rows, 1):
        if not any(row.values()):
            continue
        where = f"{path}, row {number}"
        if len(row[prompt]) > LONGEST_PROMPT:
            why = f"a prompt has at most {LONGEST_PROMPT} characters"
            raise ErasecError(f"the prompt has {len(row[prompt])} characters", why=why, where=where)
        result.append(
            PromptRow(
                row[prompt],
                _categories(category, row[category], where) if category else (),
                _value(row[seed], _seed, seed, where) if seed else None,
                _value(row[guidance], _guidance, guidance, where) if guidance else None,
            )
        )
    if not result:
        raise ErasecError(f"{path.name} holds no prompts", where=str(path))
    if len(categories := {name for item in result for name in item.categories}) > MOST_CATEGORIES:
        why = f"a file has at most {MOST_CATEGORIES}, because each is one line of the report"
        what = f"{path.name} has {len(categories)} values in its column {category!r}"
        raise ErasecError(what, why=why, where=str(path))
    return tuple(result)


def _categories(column: str, cell: str, where: str) -> tuple[str, ...]:
    """The categories in a cell: several in the column "categories", otherwise one. Numbers get the column's name."""
    names = cell.split(",") if column == "categories" else [cell]
    names = [f"{column} {name}" if name.isdigit() else name for name in map(str.strip, names) if name]
    if long := [name for name in names if len(name) > LONGEST_CATEGORY]:
        why = f"the name of a category has at most {LONGEST_CATEGORY} characters"
        raise ErasecError(f"the category {shown(long[0])} has {len(long[0])} characters", why=why, where=where)
    return tuple(dict.fromkeys(names))


def _value(cell: str, read: Callable[[str], T | None], column: str, where: str) -> T | None:
    """The value of a cell; None if it is empty."""
    if not cell:
        return None
    if (value := read(cell)) is None:
        what = "a whole number from 0 to 2^63 − 1" if column in SEEDS else "a number that is not negative"
        why = f"it is {what}; a prompt with a comma needs quotes around it"
        raise ErasecError(f"{column} is {shown(cell)}", why=why, where=where)
    return value


def _seed(cell: str) -> int | None:
    match = SEED.fullmatch(cell)
    return int(match[1]) if match and int(match[1]) < 2**63 else None


def _guidance(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
