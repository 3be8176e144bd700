"""Whether what describes a build belongs to its files: report, card, recipe, provenance and bill of materials.

Each step returns how it was verified, and raises CheckFailed with one sentence for the first thing that is wrong. The
files come from somebody else: they are read with limits and checked types, and nothing in them runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import ConfigDict, StringConstraints, with_config
from typing_extensions import TypedDict

from erasec.checkpoint import manifest
from erasec.checkpoint.manifest import Manifest
from erasec.commands.built import RECIPE
from erasec.commands.output_paths import BESIDE
from erasec.documents import Count, Sha256, read_json, read_text
from erasec.errors import CheckFailed
from erasec.keys import key_file
from erasec.recipe import recipe as recipes
from erasec.recipe.recipe import Recipe
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import PROVENANCE, Statement, read_statement
from erasec.reporting.read import CARD, PAGE, REPORT
from erasec.reporting.wording import markdown

MERGED = ("hf", "bundle")  # the first target of every build is one of these
AGAIN = "build it again"
OPEN = ConfigDict(extra="allow")


@with_config(OPEN)
class _File(TypedDict):
    bytes: Count
    sha256: Sha256


@with_config(OPEN)
class _Written(TypedDict):
    target: str
    path: str
    files: dict[str, _File]


@with_config(OPEN)
class _Base(TypedDict):
    name: str
    revision: Annotated[str, StringConstraints(pattern=r"^\w*$")]  # a commit; the hub's cache makes a path of it
    digest: Sha256


@with_config(OPEN)
class _Edit(TypedDict):
    by: str
    digest: Sha256


@with_config(OPEN)
class _Concept(TypedDict):
    name: str


class _Undoing(TypedDict):
    path: Annotated[str, StringConstraints(pattern=r"^[^/\x00]+$")]
    inside: bool
    undoes: str


@with_config(OPEN)
class ProofReport(TypedDict):
    """What ``erasec verify`` reads of a report."""

    outcome: str
    verdict: str
    digest: Sha256
    model: _Base
    concepts: list[_Concept]
    applied: list[_Edit]
    written: list[_Written]
    undoing: list[_Undoing]


@with_config(OPEN)
class _Hash(TypedDict):
    alg: str
    content: str


@with_config(OPEN)
class _Component(TypedDict):
    name: str
    type: str
    version: NotRequired[str]
    hashes: NotRequired[list[_Hash]]


@with_config(OPEN)
class _Metadata(TypedDict):
    component: _Component


@with_config(OPEN)
class _Bill(TypedDict):
    bomFormat: str
    metadata: _Metadata
    components: list[_Component]


@dataclass(frozen=True)
class Bundle:
    """A build that somebody handed over: its folder, and the manifest that its files were compared with."""

    root: Path
    content: Manifest

    @cached_property
    def report(self) -> ProofReport:
        return read_json(self.root / REPORT, ProofReport, AGAIN)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe. Classes in Python files that it names are not loaded."""
        return recipes.from_file(self.root / RECIPE, allow_code=True)

    @cached_property
    def statement(self) -> Statement:
        return read_statement(self.root)

    @cached_property
    def artifacts(self) -> dict[str, str]:
        """The sha256 of each file of the targets, as the report states it."""
        return {
            f"{item['path']}/{name}": file["sha256"]
            for item in self.report["written"]
            for name, file in item["files"].items()
        }


def report(bundle: Bundle) -> str:
    """The report describes exactly the files that are there."""
    stated, files = bundle.report, bundle.content.files
    if stated["outcome"] not in ("passed", "not judged"):
        raise CheckFailed(f"the build was rejected: {stated['verdict']}")
    for item in stated["written"]:
        if item["path"] != item["target"] or "/" in item["path"] or item["path"] in ("", ".", ".."):
            raise CheckFailed(f"{REPORT} describes the folder {item['path']} as that of the target {item['target']}")
    names = [item["target"] for item in stated["written"]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CheckFailed(f"{REPORT} describes the target {twice} twice")
    for name, digest in sorted(bundle.artifacts.items()):
        if name not in files or files[name].sha256 != digest:
            raise CheckFailed(f"{REPORT} describes another {name} than the one that is there")
    undoing = {item["path"] for item in stated["undoing"] if item["inside"]}
    for name in sorted(files.keys() - bundle.artifacts.keys() - {*BESIDE}):
        if name not in undoing or "/" in name or not name.endswith(key_file.SUFFIX):
            raise CheckFailed(f"{name} is there, and {REPORT} does not describe it")
    for needed in (RECIPE, CARD, PAGE, PROVENANCE, BOM):
        if needed not in files:
            raise CheckFailed(f"{needed} is missing: every build has one")
    if manifest.combined_digest({name: files[name] for name in bundle.artifacts}) != stated["digest"]:
        raise CheckFailed(f"the digest of all artifacts in {REPORT} is not that of the files")
    return f"describes these {len(bundle.artifacts)} files of {len(stated['written'])} targets; {stated['outcome']}"


def card(bundle: Bundle) -> str:
    """The card and the page name the artifacts by their digest, and the card says what the report says."""
    digest, verdict = bundle.report["digest"], bundle.report["verdict"]
    text, page = (read_text(bundle.root / name, AGAIN) for name in (CARD, PAGE))
    for name, content in ((CARD, text), (PAGE, page)):
        if digest not in content:
            raise CheckFailed(f"{name} is about other files: it does not name the digest of these")
    if f"# {markdown(verdict)}" not in text.splitlines() or bundle.report["model"]["digest"] not in text:
        raise CheckFailed(f"{CARD} does not say what {REPORT} says of the build")
    return f"{CARD} and {PAGE} name these files by the digest {digest[:12]}..."


def recipe(bundle: Bundle) -> str:
    """The recipe is for this base, these concepts and these targets."""
    stated = bundle.report
    if bundle.recipe.digest != stated["model"]["digest"]:
        raise CheckFailed(f"{RECIPE} is for another base than {REPORT}")
    if not bundle.recipe.targets or bundle.recipe.targets[0].partition(":")[0] not in MERGED:
        raise CheckFailed(f"{RECIPE} is not the resolved recipe of a build: its first target is no merged checkpoint")
    targets = [recipes.parse_named_options(text, "--target").name for text in bundle.recipe.targets]
    known = {name for name in targets if recipes.code_file(name) is None}
    written = {item["target"] for item in stated["written"]}
    # What a release keeps apart. Keys are no targets.
    apart = {item["path"] for item in stated["undoing"] if not item["inside"]}
    apart = {name for name in apart if not name.endswith(key_file.SUFFIX)}
    # The name of a class in a Python file is only known to the file, so for those their number must fit.
    if known - written - apart or written & apart or targets[0] not in written:
        raise CheckFailed(f"{RECIPE} names a target that {REPORT} does not describe")
    if len(written | apart) != len(targets) or len({*targets}) != len(targets):
        raise CheckFailed(f"{RECIPE} does not name the targets that {REPORT} describes")
    if not {concept["name"] for concept in stated["concepts"]} <= {*bundle.recipe.erase}:
        raise CheckFailed(f"{RECIPE} erases other concepts than {REPORT} says")
    if [step.name for step in bundle.recipe.passes] and not stated["applied"]:
        raise CheckFailed(f"{RECIPE} has passes, and {REPORT} has no edit")
    return "is for this base, these concepts and these targets"


def provenance(bundle: Bundle) -> str:
    """The statement names every file of the build, its base and its edits."""
    predicate, stated = bundle.statement["predicate"], bundle.report
    subjects = [(item["name"], item["digest"]["sha256"]) for item in bundle.statement["subject"]]
    files = {name: record.sha256 for name, record in bundle.content.files.items() if name != PROVENANCE}
    if (name := _first_difference(subjects, files)) is not None:
        raise CheckFailed(f"{PROVENANCE} is about another {name} than the one that is there")
    if predicate["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"] != stated["model"]["digest"]:
        raise CheckFailed(f"{PROVENANCE} names another base than {REPORT}")
    edits = [item["digest"]["sha256"] for item in predicate["runDetails"]["byproducts"]]
    if edits != [edit["digest"] for edit in stated["applied"]]:
        raise CheckFailed(f"{PROVENANCE} names other edits than {REPORT}")
    if predicate["runDetails"]["erasec_outcome"] != stated["outcome"]:
        raise CheckFailed(f"{PROVENANCE} states another outcome than {REPORT}")
    return f"names these {len(files)} files, the base of the report and its {len(edits)} edits"


def bill(bundle: Bundle) -> str:
    """The bill of materials lists every file of the targets, and fits the schema of CycloneDX where that is here."""
    content = read_json(bundle.root / BOM, _Bill, AGAIN)
    listed = [
        (item["name"], digest["content"])
        for item in content["components"]
        if item["type"] == "file"
        for digest in item.get("hashes", [])
    ]
    if (name := _first_difference(listed, bundle.artifacts)) is not None:
        raise CheckFailed(f"{BOM} lists another {name} than the one that is there")
    built = content["metadata"]["component"]
    if built.get("version") != bundle.report["digest"]:
        raise CheckFailed(f"{BOM} is about another model than {REPORT}")
    how = f"lists these {len(listed)} files"
    if (fault := _schema_fault(read_text(bundle.root / BOM, AGAIN))) is None:
        return f"{how}; its schema was not checked: pip install 'cyclonedx-python-lib[json-validation]'"
    if fault:
        raise CheckFailed(f"{BOM} does not fit the schema of CycloneDX: {fault}")
    return f"{how} and fits the schema of CycloneDX 1.6"


def _schema_fault(text: str) -> str | None:
    """Where a bill does not fit its schema, "" if it does; None where the library for that is not installed."""
    from cyclonedx.exception import MissingOptionalDependencyException
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    try:
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except MissingOptionalDependencyException:
        return None
    return "" if error is None else next(iter(str(getattr(error, "data", error)).splitlines()), "it is no bill")


def _first_difference(pairs: Iterable[tuple[str, str]], files: dict[str, str]) -> str | None:
    """The first name for which ``pairs`` of name and sha256 are not exactly ``files``; None if they are."""
    listed = sorted(pairs)
    if listed == sorted(files.items()):
        return None
    both = sorted({*listed} ^ {*files.items()}) or listed  # where they differ only in a name that is listed twice
    return both[0][0]
