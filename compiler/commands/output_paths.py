"""Where a build may write: never over what is not its own, and never in or around the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.keys import key_file as secret
from erasec.model import view as models

if TYPE_CHECKING:
    from erasec.model.view import Model


def check_free(out: Path) -> None:
    """Raise ErasecError for a folder that holds anything but an earlier build: a build replaces it as a whole."""
    if out.exists() and not out.is_dir():
        raise ErasecError(f"{out} is a file", fix="give a folder that does not exist yet: --out DIR")
    check_not_around(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if keys := sorted(path.name for path in out.iterdir() if secret.is_key(path)):
        raise ErasecError(
            f"the output folder {out} holds {keys[0]}",
            why="a build replaces its folder as a whole, and nothing else opens what was built with that key",
            fix="keep the key elsewhere, or give another folder with --out",
        )
    if not _is_build(out):
        names = sorted(path.name for path in out.iterdir())
        raise ErasecError(
            f"the output folder {out} is not empty",
            why=f"it holds {', '.join(names[:3])}{', ...' if names[3:] else ''} and no earlier build of erasec",
            fix="give another folder with --out, or empty this one",
        )


def check_not_around(out: Path) -> None:
    """Raise ErasecError where the working directory is ``out`` or lies in it."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise ErasecError(f"the output folder {out} holds the working directory", fix="give a folder in it: --out DIR")


def _is_build(out: Path) -> bool:
    """Whether a folder holds an earlier build, or the remains of a rejected one, and nothing else."""
    names = {path.name for path in out.iterdir()}
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        own = {item["path"] for item in report["written"]} if report["schema"].startswith("erasec.report/") else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return names == {".rejected"}
    return names <= {"report.json", "report.html", "README.md", "recipe.toml", ".rejected", *own}


def check_apart(out: Path, model: Model) -> None:
    """Raise ErasecError where ``out`` and the model's files lie in each other."""
    given = Path(model.name).expanduser()
    source = (given if model.name not in models.BUNDLED and given.exists() else model.source.root).resolve()
    target = out.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ErasecError(
            f"the output {out} and the model {source} lie in each other",
            why="an output folder is replaced as a whole, and the model is never touched",
            fix="give another path with --out",
        )
