"""What was erased from a base before, read from the report of the build that the base is part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from erasec.errors import ErasecError
from erasec.ldm.single_file import SingleFile
from erasec.recipe.concept import Concept
from erasec.reporting.read import REPORT, read_report

if TYPE_CHECKING:
    from erasec.model.view import Model


def erased_before(model: Model) -> tuple[Concept, ...]:
    """The concepts that builds before this one erased from ``model``, if it is a folder or file of a build.

    They are in the report above the folder; a folder that was moved away from its report says nothing. Raises
    ErasecError for a damaged report.
    """
    source = model.source
    folder = (source.file.parent if isinstance(source, SingleFile) else source.root).resolve()
    if not (folder.parent / REPORT).is_file():
        return ()
    report = read_report(folder.parent)
    ours = report.get("schema", "").startswith("erasec.report/")
    if not ours or folder.name not in {item["path"] for item in report.get("written", [])}:
        return ()
    try:
        rows = (*report.get("earlier", []), *report.get("concepts", []))
        concepts = [Concept.model_validate(item) for item in rows]
    except ValidationError as error:
        raise ErasecError(
            "the report of the base is damaged",
            why="it should say what was erased from the base before",
            where=str(folder.parent / REPORT),
            fix="build the base again; or move its folder away from the report, and its history is not known",
        ) from error
    return tuple({concept.name: concept for concept in concepts}.values())
