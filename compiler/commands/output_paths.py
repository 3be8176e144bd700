"""Checks of output paths: a build never replaces foreign files, and never writes in or around the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from erasec.checkpoint import manifest
from erasec.checkpoint.staging import check_place, file_name
from erasec.commands.built import RECIPE
from erasec.errors import ErasecError
from erasec.keys.key_file import is_key
from erasec.model import loading
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE
from erasec.reporting.read import CARD, PAGE, REPORT, read_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from erasec.keys.key_file import Key
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

# What a build writes next to its targets' folders.
BESIDE = (REPORT, PAGE, CARD, RECIPE, BOM, PROVENANCE, manifest.SIGNATURE)
NAMED = 6  # the name of an output folder lists at most so many concepts


def default_out(model: str, concepts: Sequence[Concept], keys: Sequence[Key] = ()) -> Path:
    """The output folder of a build that names none: MODEL-without-CONCEPT in the working directory."""
    words = [Path(model).expanduser().resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]]
    names = [key.concept.name for key in keys] or [concept.name for concept in concepts]
    words += ["with" if keys else "without", *(names if len(names) <= NAMED else [f"{len(names)} concepts"])]
    return Path(file_name(words))


def check_replaceable(out: Path) -> None:
    """Raise ErasecError if ``out`` holds anything except an earlier build: a build replaces the whole folder."""
    check_place(out)
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
    if foreign := _foreign_files(out):
        raise ErasecError(
            f"the output folder {out} is not empty",
            why=f"it holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}, which no earlier build wrote",
            fix="give another folder with --out, or move them elsewhere",
        )


def check_not_working_directory(out: Path) -> None:
    """Raise ErasecError if the working directory is ``out`` or lies in it."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise ErasecError(f"the output folder {out} holds the working directory", fix="give a new folder: --out DIR")


def _foreign_files(out: Path) -> list[str]:
    """The files in ``out`` that are not of an earlier build, or of a rejected one; hidden files in them do not count.

    The manifest of a build lists its files. Where no build is, all files are foreign.
    """
    own: set[str] = set()
    for root, prefix in ((out, ""), (out / manifest.REJECTED, f"{manifest.REJECTED}/")):
        if (listed := _listed_files(root)) is not None:
            own |= {prefix + name for name in (*BESIDE, *listed)}
    present = (path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        path.as_posix()
        for path in present
        if path.as_posix() not in own
        and not (own and len(path.parts) > 1 and any(part.startswith(".") for part in path.parts[1:]))
    )


def _listed_files(root: Path) -> set[str] | None:
    """The files of a build, by its manifest; where erasec 0.1.0 wrote none, by its report. None if it is no build."""
    try:
        if (root / manifest.FILE).is_file():
            return {manifest.FILE, *manifest.read(root)[0].files}
        report = read_report(root)
    except ErasecError:
        return None
    if not report.get("schema", "").startswith("erasec.report/"):
        return None
    return {f"{item['path']}/{name}" for item in report.get("written", []) for name in item.get("files", {})}


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
