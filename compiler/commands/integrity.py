"""Compares a folder with the digests that erasec recorded: in its manifest, its report, or the header of a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from erasec.base import Check
from erasec.checkpoint import manifest
from erasec.checkpoint.manifest import Differences, Manifest
from erasec.checkpoint.safetensors import read_header
from erasec.checkpoint.sealed import DIGEST, read_sealed
from erasec.errors import ErasecError
from erasec.reporting.read import REPORT, Record, outcome, read_report

STATES = ("lost", "changed", "added")
NAMED = 5  # names of files that a check lists for each state

Digests = Mapping[str, str]  # the sha256 of each file, by its path in the folder


def compare_with_manifest(root: Path) -> tuple[tuple[Check, ...], Differences | None]:
    """Compare all that is below ``root`` with its manifest, and the report of a build with the manifest.

    A build gets one check for each of its folders, another folder one for all files. The differences are None where the
    manifest is damaged.
    """
    try:
        content, digest = manifest.read(root)
    except ErasecError as error:
        return (Check("manifest", math.inf, 0.0, False, f"{error.what}: {error.why}"),), None
    whole = Check.at_most("manifest", 0.0, 0.0, f"1 if {manifest.FILE} is damaged; its own sha256 is {digest}")
    differences = manifest.compare(root, content)
    return (whole, *_file_checks(content, differences), *_report_checks(root, content, differences)), differences


def _file_checks(content: Manifest, differences: Differences) -> Iterator[Check]:
    def group(name: str) -> str:
        """The folder of a build that a path lies in; "" for the build's own files, and for all of another folder."""
        return name.partition("/")[0] if "/" in name and REPORT in content.files else ""

    for wanted in sorted({group(name) for name in (*content.files, *differences.all)}):
        count = sum(group(name) == wanted for name in content.files)
        states = {state: [name for name in getattr(differences, state) if group(name) == wanted] for state in STATES}
        how = f"files that differ from the {count} listed in {manifest.FILE}, by size and sha256" + listed(states)
        yield Check.at_most(f"{wanted}/files".lstrip("/"), float(sum(map(len, states.values()))), 0.0, how)


def _report_checks(root: Path, content: Manifest, differences: Differences) -> Iterator[Check]:
    """Count where the report of a build disagrees with its manifest. That the build was rejected counts as one."""
    if REPORT not in content.files or REPORT in differences.all:
        return
    try:
        report = read_report(root)
    except ErasecError as error:
        yield Check("report", math.inf, 0.0, False, f"{error.what}: {error.why}")
        return
    faults = ["that the build was rejected, because a check failed"] if outcome(report) == "rejected" else []
    digests = {f"{target}/{name}": file for target, own in _digests(report).items() for name, file in own.items()}
    described = {name: file for name, file in digests.items() if name not in content.renewed}
    recorded = {name: file.sha256 for name, file in content.files.items()}
    faults += sorted(name for name, digest in described.items() if recorded.get(name) != digest)
    how = f"disagreements of {REPORT} and {manifest.FILE} on {len(described)} files, and whether the build was rejected"
    if content.renewed:
        how += f"; {len(content.renewed)} files were changed by erasec later, and the report is about those before"
    if outcome(report) == "not judged":
        how += f"; the build was {not_judged(report)}"
    yield Check.count("report", faults, how)


def not_judged(report: Record) -> str:
    """That a build was not judged, and which concepts no judge could see."""
    return f"not judged: no judge could see {', '.join(report.get('unjudged', [])) or 'a concept'} in its pictures"


def outcome_notes(root: Path) -> tuple[str, ...]:
    """A sentence where the build with the manifest in ``root`` was not judged: its checks say nothing about that."""
    try:
        report = read_report(root)
    except ErasecError:  # of another folder than a build; a damaged report is a check of its own
        return ()
    return (f"the build in {root} was {not_judged(report)}",) if outcome(report) == "not judged" else ()


def sealed_check(file: Path) -> Check:
    """Compare a file of erasec with the digest in its own header. Raises ErasecError where it has none."""
    if DIGEST not in read_header(file)[1]:
        raise ErasecError(
            f"{file.name} cannot be checked",
            why=f"it holds no digest of its content, and no folder above it has {manifest.FILE}",
            where=str(file),
            fix="give a folder that erasec build wrote, or a file in it",
        )
    try:
        read_sealed(file)
    except ErasecError as error:
        return Check("content", math.inf, 0.0, False, f"{error.what}: {error.why}")
    return Check.at_most("content", 0.0, 0.0, "1 if the content differs from the digest in the header of the file")


def recorded_digests(folder: Path) -> dict[str, Digests]:
    """The digests in a build's report.json, by the path of the target; empty if there is no report."""
    return _digests(read_report(folder)) if (folder / REPORT).is_file() else {}


def _digests(report: Record) -> dict[str, Digests]:
    return {
        target["path"]: {name: file["sha256"] for name, file in target.get("files", {}).items()}
        for target in report.get("written", [])
    }


def listed(states: Mapping[str, Sequence[str]]) -> str:
    """The names of files in each state, as text: the first ones, and the number of the others."""
    text = ""
    for state, names in states.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        text += f"; {state}: {', '.join(names[:NAMED])}{more}" if names else ""
    return text
