"""Checks of output paths: a build never replaces foreign files, and never writes in or around the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from erasec.errors import ErasecError
from erasec.keys.key_file import is_key
from erasec.model import loading
from erasec.reporting.read import read_report

if TYPE_CHECKING:
    from erasec.model.view import Model


def check_replaceable(out: Path) -> None:
    """Raise ErasecError if ``out`` holds anything except an earlier build: a build replaces the whole folder."""
    if out.exists() and not out.is_dir():
        raise ErasecError(f"{out} is a file", fix="give a folder that does not exist yet: --out DIR")
    check_not_working_directory(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    if keys := sorted(path.name for path in out.iterdir() if is_key(path)):
        raise ErasecError(
            f"the output folder {out} holds {keys[0]}",
            why="a build replaces the whole folder, and no other key opens the model that was built with this one",
            fix="move the key elsewhere, or give another folder with --out",
        )
    if not _is_build(out):
        names = sorted(path.name for path in out.iterdir())
        raise ErasecError(
            f"the output folder {out} is not empty",
            why=f"it holds {', '.join(names[:3])}{', ...' if names[3:] else ''} and is no earlier build of erasec",
            fix="give another folder with --out, or empty this one",
        )


def check_not_working_directory(out: Path) -> None:
    """Raise ErasecError if the working directory is ``out`` or lies in it."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise ErasecError(f"the output folder {out} holds the working directory", fix="give a new folder: --out DIR")


def _is_build(out: Path) -> bool:
    """Whether a folder holds an earlier build or a rejected build, and nothing else."""
    names = {path.name for path in out.iterdir()}
    try:
        report = read_report(out)
    except ErasecError:
        return names == {".rejected"}
    ours = report.get("schema", "").startswith("erasec.report/")
    own = {item["path"] for item in report.get("written", [])} if ours else set()
    return names <= {"report.json", "report.html", "README.md", "recipe.toml", ".rejected", *own}


def check_disjoint(out: Path, model: Model) -> None:
    """Raise ErasecError if ``out`` lies in the folder of the model, or the model lies in ``out``."""
    given = Path(model.name).expanduser()
    source = (given if model.name not in loading.BUNDLED and given.exists() else model.source.root).resolve()
    target = out.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ErasecError(
            f"the output {out} and the model {source} lie in each other",
            why="an output folder is replaced as a whole, and a build must not change the model",
            fix="give another path with --out",
        )
