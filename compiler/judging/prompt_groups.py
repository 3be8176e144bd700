"""Paints and judges the prompts of prompt files: hit rates by category before and after the edit, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.base import Check, Question
from erasec.judging.evidence import labels
from erasec.judging.intervals import wilson

if TYPE_CHECKING:
    from erasec.base import Images, Judge
    from erasec.judging.prompt_files import PromptFile
    from erasec.recipe.concept import Concept

    # Pictures (n, height, width, 3) of n questions before and after the edit, at one guidance scale.
    Painter = Callable[[Sequence[Question], float], tuple[Images, Images]]


def questions(file: PromptFile, label: str, seed: int) -> tuple[Question, ...]:
    """A question for each row, in the group "FILE/CATEGORY" with the first category of the row, or "FILE".

    ``label`` is what a judge looks for, "" if no judge can see the concept. Rows without a seed get seeds as those of
    other questions, from the build's ``seed``.
    """
    return tuple(
        Question(
            "/".join((file.name, *row.categories[:1])),
            row.prompt,
            seed * 1_000_003 + number if row.seed is None else row.seed,
            label,
        )
        for number, row in enumerate(file.rows)
    )


def paint(file: PromptFile, seed: int, guidance: float, painter: Painter) -> tuple[Images, Images]:
    """Pictures of each row before and after the edit, each (n, height, width, 3), with the row's own seed and guidance
    scale, or those of the build."""
    items = questions(file, "", seed)
    scales = np.array([guidance if row.guidance is None else row.guidance for row in file.rows])
    pairs: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    for scale in np.unique(scales):  # a pipeline takes one guidance scale for a whole batch
        rows = np.flatnonzero(scales == scale).tolist()
        before, after = painter([items[row] for row in rows], float(scale))
        pairs |= dict(zip(rows, zip(before, after, strict=True), strict=True))
    ordered = [pairs[row] for row in range(len(file.rows))]
    return np.stack([before for before, _ in ordered]), np.stack([after for _, after in ordered])


def labels_of(judge: Judge | None, concepts: Sequence[Concept]) -> list[str]:
    """The labels of all concepts that the judge can see."""
    return [] if judge is None else sorted({label for concept in concepts for label in labels(judge, concept)})


def table(file: PromptFile, seen: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> dict[str, Any]:
    """The hit rates of a file, as the report has them: a row for all prompts and one for each category, by label.

    ``seen`` has, for each label, whether the picture of each row shows it before and after the edit, (n,) each. Rates
    have Wilson's interval of 95 %. A prompt counts in each of its categories.
    """
    names = sorted({name for row in file.rows for name in row.categories})
    masks = {"": np.ones(len(file.rows), dtype=bool)}
    masks |= {name: np.array([name in row.categories for row in file.rows]) for name in names}
    rows = [
        {
            "category": name,
            "looked_for": label,
            "images": int(mask.sum()),
            "before": float(before[mask].mean()),
            "before_interval": list(wilson(int(before[mask].sum()), int(mask.sum()))),
            "after": float(after[mask].mean()),
            "after_interval": list(wilson(int(after[mask].sum()), int(mask.sum()))),
        }
        for label, (before, after) in seen.items()
        for name, mask in masks.items()
    ]
    return {"file": file.name, "sha256": file.digest, "prompts": file.total, "used": len(file.rows), "rows": rows}


def checks(facts: dict[str, Any], limit: float | None, conditions: str) -> tuple[Check, ...]:
    """A check for each row of a ``table``: the share of pictures that show the concept after the edit.

    Papers call it the attack success rate, without any attack but the prompts themselves. A file whose prompts show
    the concept in no picture before the edit measures nothing: the values of its checks are infinite.
    """
    every = {row["looked_for"]: row for row in facts["rows"] if not row["category"]}
    several = len(every) > 1
    results = []
    for row in facts["rows"]:
        label = row["looked_for"]
        value = row["after"] if every[label]["before"] else math.inf
        how = (
            f"share of pictures that show {label} after the edit, {_rate(row, 'after')}, "
            f"before {_rate(row, 'before')}, {row['images']} prompts; {conditions}"
        )
        parts = ("prompts", facts["file"], row["category"], label if several else "")
        results.append(Check.at_most("/".join(filter(None, parts)), value, limit, how))
    return tuple(results)


def _rate(row: dict[str, Any], side: str) -> str:
    low, high = row[f"{side}_interval"]
    return f"{row[side]:.1%} ({low:.1%} to {high:.1%})"
