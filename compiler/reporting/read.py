"""Reads the report of an earlier build: what it erased, which files it wrote, and how long it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from erasec.documents import read_json

# The files of a report: for programs, for readers, and the model card.
REPORT, PAGE, CARD = "report.json", "report.html", "README.md"


@with_config(ConfigDict(extra="allow"))
class WrittenFile(TypedDict):
    """A file that a target wrote."""

    sha256: str


@with_config(ConfigDict(extra="allow"))
class Written(TypedDict):
    """The folder of one target, and its files by name."""

    path: str
    files: NotRequired[dict[str, WrittenFile]]


@with_config(ConfigDict(extra="allow"))
class Record(TypedDict):
    """What later commands need of a report."""

    schema: NotRequired[str]
    written: NotRequired[list[Written]]
    seconds: NotRequired[dict[str, float]]
    passed: NotRequired[bool]
    outcome: NotRequired[str]  # missing in reports of erasec 0.1.0, which had no more than ``passed``
    unjudged: NotRequired[list[str]]
    concepts: NotRequired[list[dict[str, Any]]]  # the Concept fields
    earlier: NotRequired[list[dict[str, Any]]]


def read_report(folder: Path) -> Record:
    """The report of the build in ``folder``. Raises ErasecError where it is missing or damaged."""
    return read_json(folder / REPORT, Record, "build it again")


def outcome(report: Record) -> str:
    """The state of the build: "passed", "not judged" or "rejected". One that the report does not know is "rejected"."""
    stated = report.get("outcome") or ("passed" if report.get("passed") is True else "rejected")
    return stated if stated in ("passed", "not judged") else "rejected"
