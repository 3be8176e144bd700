"""What a user names after a build: the build itself, one of its folders, a file in one, or any other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.recipe import recipe as recipes
from erasec.reporting.read import REPORT, read_report

if TYPE_CHECKING:
    from erasec.recipe.recipe import Recipe
    from erasec.reporting.read import Record

RECIPE = "recipe.toml"
MERGED = "hf"  # the folder of the merged checkpoint in a build


@dataclass(frozen=True)
class Built:
    """A folder or file with a model, and what is known of the build that it belongs to."""

    path: str
    build: Path | None = None
    record: Record | None = None
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()


def find_built(model: str) -> Built:
    """The folder or file that ``model`` names, with the build around it if there is one. Raises ErasecError."""
    path = Path(model).expanduser()
    for build in (path, path.parent, path.parent.parent):  # the build, one of its folders, or a file in one
        if not (path.exists() and (build / REPORT).is_file()):
            continue
        record, notes, recipe = read_report(build), [], None
        if (build / RECIPE).is_file():
            try:
                recipe = recipes.from_file(build / RECIPE)
            except ErasecError as error:
                notes.append(f"The recipe of the build was not read: {error.what}. What needs it is left out.")
        inner = build / MERGED if build == path else path
        if not inner.exists():
            raise ErasecError(f"the build {path} has no folder {MERGED}", fix="name one of the folders in it")
        return Built(str(inner), build, record, recipe, tuple(notes))
    return Built(model)
