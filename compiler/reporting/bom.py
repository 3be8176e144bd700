"""The bill of materials of a build, ``bom.cdx.json``: CycloneDX, with the built model as its subject.

The library writes the components; it has no model card (it is the part that makes a bill one of machine learning), so
that one is added to its JSON by the names of the CycloneDX schema. The same artifacts give the same bytes: there is no
time in it, and its serial number is made from the digest of the artifacts.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.reporting.facts import GROUPS, mean_rates

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

    from erasec.reporting.report import Report

BOM = "bom.cdx.json"
MODEL, BASE = "model", "base"  # references within the bill
NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # that of URLs, of RFC 9562
NOT_PACKAGES = ("python", "machine")  # rows of a report's environment


def bill(report: Report) -> str:
    """The text of the bill: the model that was built, its files, its base, and the libraries that made it."""
    from cyclonedx.output.json import JsonV1Dot6

    content = json.loads(JsonV1Dot6(_bom(report)).output_as_string())
    content["metadata"].pop("timestamp", None)
    content["metadata"]["component"]["modelCard"] = _card(report)
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _bom(report: Report) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import ComponentType

    name, digest = Path(report.model["name"]).name, report.digest
    built = _component(
        f"{name} without {', '.join(concept['name'] for concept in report.concepts)}" if report.concepts else name,
        ComponentType.MACHINE_LEARNING_MODEL,
        MODEL,
        version=digest,
        properties={"erasec:outcome": report.outcome, "erasec:artifacts:sha256": digest}
        | {f"erasec:undoes:{item['path']}": item["undoes"] for item in report.undoing if item["inside"]},
    )
    base = _component(
        report.base.name if report.base else name,
        ComponentType.MACHINE_LEARNING_MODEL,
        BASE,
        version=report.model["revision"] or report.model["digest"],
        properties={"erasec:weights:sha256": report.model["digest"], "erasec:family": report.model["family"]},
    )
    files = [
        _component(f"{item.path}/{file}", ComponentType.FILE, f"file:{item.path}/{file}", sha256=sha256)
        for item in report.written
        for file, (_, sha256) in item.files.items()
    ]
    libraries = [
        _component(package, ComponentType.LIBRARY, f"pkg:pypi/{package}@{version}", version=version, pypi=True)
        for package, version in sorted(report.environment.items())
        if package not in NOT_PACKAGES
    ]
    bom = Bom(
        serial_number=uuid.uuid5(NAMESPACE, f"urn:erasec:artifacts:sha256:{digest}"),
        metadata=BomMetaData(component=built),
        components=[base, *files, *libraries],
    )
    bom.register_dependency(built, [base, *files, *libraries])
    return bom


def _component(
    name: str,
    kind: Any,
    reference: str,
    version: str = "",
    sha256: str = "",
    properties: dict[str, str] | None = None,
    pypi: bool = False,
) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    return Component(
        name=name,
        type=kind,
        bom_ref=reference,  # those of the library are random
        version=version or None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else None,
        properties=[Property(name=key, value=value) for key, value in (properties or {}).items()],
        purl=PackageURL("pypi", None, name, version) if pypi else None,
    )


def _card(report: Report) -> dict[str, Any]:
    """The model card: what the model does, what was measured, and what it cannot promise."""
    measured = [*_rates(report), *_checks(report)]
    limits = [*report.notes, *(edit.limits for edit in report.applied if edit.limits)]
    return {
        "modelParameters": {
            "task": "text-to-image",
            "modelArchitecture": report.model["family"],
        },
        "quantitativeAnalysis": {"performanceMetrics": measured},
        "considerations": {"technicalLimitations": list(dict.fromkeys(limits))},
    }


def _rates(report: Report) -> Iterator[dict[str, str]]:
    for group, (title, _) in GROUPS.items():
        if mean := mean_rates(report.rates, group):
            for side in ("before", "after"):
                yield {"type": f"hit rate {side} the edit", "slice": title, "value": repr(mean[side])}


def _checks(report: Report) -> Iterator[dict[str, str]]:
    for check in report.checks:
        if math.isfinite(check.value) and not check.name.endswith("/seconds"):
            yield {"type": f"check {check.name}", "value": repr(check.value), "slice": check.outcome}
