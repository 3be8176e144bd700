"""The provenance of a build, ``provenance.json``: an in-toto statement with a predicate in the form of SLSA's.

It names every file of the build by its sha256, and what they were made of and by. Its two times are the only ones that
a build writes; SOURCE_DATE_EPOCH sets both. The formats: in-toto Attestation Framework, Statement v1; SLSA v1.0,
Provenance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from erasec.documents import Sha256, read_json
from erasec.errors import ErasecError

if TYPE_CHECKING:
    from erasec.checkpoint.manifest import FileRecord
    from erasec.recipe.recipe import Recipe
    from erasec.reporting.report import Report

PROVENANCE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD, BUILDER = "urn:erasec:build:1", "urn:erasec:builder"
EPOCH = "SOURCE_DATE_EPOCH"
INPUTS = ("model", "revision", "variant", "erase", "targets", "keys", "absorb", "judge", "audit", "seed", "device")


@dataclass(frozen=True)
class Facts:
    """What a provenance states and a report does not: the ``recipe``, the sha256 of each edited tensor before the edit
    by "component/key", the judges by their titles, and the seconds since 1970 when the build began and ended."""

    recipe: Recipe
    edited: Mapping[str, str]
    judges: Mapping[str, str]
    started: float
    finished: float


def statement(report: Report, files: Mapping[str, FileRecord], facts: Facts) -> str:
    """The text of the statement about ``files``, all files of the build except itself and the manifest."""
    recipe = facts.recipe.model_dump(mode="json", by_alias=True)
    base = {
        "name": report.model["name"],
        "uri": _uri(report),
        "digest": {"sha256": report.model["digest"]},
        "annotations": {"family": report.model["family"], "revision": report.model["revision"], "of": "all weights"},
    }
    edits = [
        {"name": f"edit {number}: {edit.by} on {', '.join(edit.concepts)}", "digest": {"sha256": edit.digest}}
        for number, edit in enumerate(report.applied, 1)
    ]
    predicate = {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": {name: recipe[name] for name in INPUTS} | {"rebuild": report.rebuild},
            "internalParameters": {
                "passes": [
                    {"name": edit.by, "version": edit.version, "concepts": list(edit.concepts), "options": edit.params}
                    for edit in report.applied
                ],
                "edited": dict(sorted(facts.edited.items())),
                "environment": dict(report.environment),
            },
            "resolvedDependencies": [base, *(_file(item) for item in report.prompt_files)],
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"erasec": report.environment.get("erasec", "")}},
            "metadata": {"startedOn": _time(facts.started), "finishedOn": _time(facts.finished)},
            "byproducts": edits,
            # SLSA leaves names with a prefix to those who extend it.
            "erasec_outcome": report.outcome,
            "erasec_checks": [{"name": check.name, "outcome": check.outcome} for check in report.checks],
            "erasec_judges": dict(sorted(facts.judges.items())),
            "erasec_audits": [
                {"concept": item["concept"]["name"], "suite": item["suite"], "headline": item["headline"]}
                for item in report.audits
            ],
            "erasec_undoing": [dict(item) for item in report.undoing],
        },
    }
    content = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": record.sha256}} for name, record in sorted(files.items())],
        "predicateType": PREDICATE,
        "predicate": predicate,
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _uri(report: Report) -> str:
    """The package URL of a model of the hub; for any other, a name by its content."""
    if report.model["revision"] and report.base is not None:
        return f"pkg:huggingface/{report.base.name}@{report.model['revision']}"
    return f"urn:erasec:model:sha256:{report.model['digest']}"


def _file(table: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": table["file"], "digest": {"sha256": table["sha256"]}}


def epoch() -> float | None:
    """The time that SOURCE_DATE_EPOCH sets, in seconds since 1970; None if it is not set. Raises ErasecError."""
    text = os.environ.get(EPOCH, "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 11:
        fix = "give seconds since 1970, such as the time of the commit: git log -1 --format=%ct"
        raise ErasecError(f"{EPOCH} is {text!r}", why="it is no number of seconds", fix=fix)
    return float(text)


def _time(seconds: float) -> str:
    fixed = epoch()
    return datetime.fromtimestamp(seconds if fixed is None else fixed, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Digest(TypedDict):
    """The digests of a file that a statement names."""

    sha256: Sha256


@with_config(ConfigDict(extra="allow"))
class Resource(TypedDict):
    """A file or model that a statement names."""

    name: str
    digest: Digest


@with_config(ConfigDict(extra="allow"))
class _Internal(TypedDict):
    edited: dict[str, Sha256]


@with_config(ConfigDict(extra="allow"))
class _Definition(TypedDict):
    buildType: Literal["urn:erasec:build:1"]
    internalParameters: _Internal
    resolvedDependencies: Annotated[list[Resource], Field(min_length=1)]


@with_config(ConfigDict(extra="allow"))
class _Run(TypedDict):
    byproducts: list[Resource]
    erasec_outcome: str


@with_config(ConfigDict(extra="allow"))
class _Predicate(TypedDict):
    buildDefinition: _Definition
    runDetails: _Run


class Statement(TypedDict):
    """What ``erasec verify`` reads of a statement."""

    _type: Literal["https://in-toto.io/Statement/v1"]
    subject: list[Resource]
    predicateType: Literal["https://slsa.dev/provenance/v1"]
    predicate: _Predicate


def read_statement(folder: Path) -> Statement:
    """The provenance of the build in ``folder``. Raises ErasecError where it is missing or damaged."""
    return read_json(folder / PROVENANCE, Statement, "build it again")
