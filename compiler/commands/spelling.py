"""One way to write each path of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from erasec.model import loading
from erasec.recipe.recipe import Recipe


def one_spelling(recipe: Recipe) -> Recipe:
    """The recipe with every path written in one way, so that its bytes do not depend on how a path was typed."""
    uses = (
        use.model_copy(
            update={
                "name": _code_spelling(use.name),
                "options": {key: _spelling(value) if _is_path(value) else value for key, value in use.options.items()},
            }
        )
        for use in recipe.passes
    )
    return recipe.model_copy(
        update={
            "model": recipe.model if recipe.model in loading.BUNDLED else _spelling(recipe.model),
            "keys": tuple(map(_spelling, recipe.keys)),
            "targets": tuple(map(_code_spelling, recipe.targets)),
            "judge": _code_spelling(recipe.judge)
            if isinstance(recipe.judge, str)
            else tuple(map(_code_spelling, recipe.judge)),
            "passes": tuple(uses),
        }
    )


def _is_path(value: object) -> bool:
    """Whether the value of an option can only be a path; another text may have the name of a file by chance."""
    return isinstance(value, str) and (value.startswith("~") or "/" in value)


def _spelling(text: Any) -> str:
    """The one way to write the path of an existing file or folder: without links, relative to the working directory
    where it lies in it, else absolute. Any other text stays as it is."""
    path = Path(text).expanduser()
    try:
        if not text or not path.exists():
            return str(text)
        path, here = path.resolve(), Path.cwd()
    except OSError:  # a text too long for a path, for example
        return str(text)
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def _code_spelling(text: str) -> str:
    """A name, or FILE.py:CLASS with its file written in one way."""
    file, code, rest = text.partition(".py:")
    return f"{_spelling(file + '.py')}:{rest}" if code else text
