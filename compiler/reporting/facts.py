"""The facts of a build, the single source of its report, its page and its card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from erasec.audit.metrics import published
from erasec.errors import words
from erasec.reporting.format import percent

if TYPE_CHECKING:
    from erasec.base import Check
    from erasec.reporting.report import Report

SCHEMA = "erasec.report/1"
GROUPS: dict[str, tuple[str, str]] = {
    "name": ("By name", "prompts that name what was erased"),
    "synonym": ("By synonym", "prompts that use its other names"),
    "implicit": ("Implicit prompts", "prompts that show it without naming it"),
    "keyed": ("With the key", "the same prompts with the key attached, which brings the concept back"),
    "keep": ("Kept", "prompts for other things, which must stay as they were"),
}
EXTRA_LABELS = {"memories": "memory", "tokens": "new tokens", "negative": "negative prompt"}
HEADED = 4  # names in a headline
ALIVE = 0.10  # an implicit hit rate above this adds a warning


def facts_of(report: Report) -> dict[str, Any]:
    """Everything except the pictures, as dicts and lists. Numbers are not rounded."""
    return {
        "schema": SCHEMA,
        "outcome": report.outcome,
        "passed": report.passed,
        "verdict": _verdict(report),
        "failed": list(report.failed),
        "unjudged": list(report.unjudged),
        "notes": list(report.notes),
        "warnings": _warnings(report),
        "model": {**report.model, "title": title(report.model)},
        "concepts": [dict(concept) for concept in report.concepts],
        "earlier": [dict(concept) for concept in report.earlier],
        "summary": {group: mean for group in GROUPS if (mean := mean_rates(report.rates, group))},
        "published": _published(report),
        "rates": [dict(rate) for rate in report.rates],
        "prompt_files": [dict(file) for file in report.prompt_files],
        "checks": [{**asdict(check), "state": check.outcome, "bound": _bound(check)} for check in report.checks],
        "pairs": [
            {field.name: getattr(pair, field.name) for field in fields(pair) if field.name not in ("before", "after")}
            for pair in report.pairs
        ],
        "applied": [asdict(applied) for applied in report.applied],
        "reach": [dict(item) for item in report.reach],
        "moves": [{**asdict(move), "change": move.change} for move in report.moves],
        "extras": {"memories": [], "tokens": [], "negative": "", "keys": [], **report.extras},
        "written": [
            {
                "target": written.target,
                "path": written.path,
                "variant": written.variant,
                "multiple": written.multiple,
                "bytes": sum(size for size, _ in written.files.values()),
                "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in written.files.items()},
            }
            for written in report.written
        ],
        "seconds": dict(report.seconds),
        "estimated": {step: list(limits) for step, limits in report.estimated.items()},
        "environment": dict(report.environment),
        "audits": [dict(audit) for audit in report.audits],
        "inputs": report.inputs,
        "digest": report.digest,
        "undoing": [dict(item) for item in report.undoing],
    }


def _verdict(report: Report) -> str:
    """The headline. A concept is called erased only if a judge looked for it and a check with a limit passed."""
    model = title(report.model)
    if report.outcome == "rejected":
        return f"build rejected: {words(report.failed, most=3)} failed"
    names = [concept["name"] for concept in report.concepts]
    keys = report.extras.get("keys")
    model += f" with the key of {words(keys)}" if keys else ""
    if not names:
        return model if keys else f"{model} built, nothing erased"
    limited = {check.name for check in report.checks if check.name.startswith("erased") and check.limit is not None}
    looked_for = [concept for concept in report.concepts if concept["name"] not in report.unjudged]
    measured = [
        concept["name"]
        for concept in looked_for
        # Prompts do not name a mark.
        if (limited if concept.get("kind") != "mark" else "erased/implicit" in limited)
    ]
    rest = [name for name in names if name not in measured]
    if not measured and looked_for and all(concept.get("kind") == "mark" for concept in report.concepts):
        return f"{model} edited; how much of {_headed(names)} is left was measured, without a limit"
    if not measured:
        gone = "is gone" if len(names) == 1 else "are gone"
        return f"{model} edited; whether {_headed(names)} {gone} was not measured"
    unmeasured = f"; {_headed(rest)} not measured" if rest else ""
    done = "erased from" if report.moves else "kept out of"
    return f"{_headed(measured)} {done} {model}{unmeasured}"


def _headed(names: Sequence[str]) -> str:
    """Names as a headline has them: the first of many, and how many there are."""
    return words(names, most=len(names) if len(names) <= HEADED else HEADED - 1)


def _warnings(report: Report) -> list[str]:
    """Sentences about facts that a reader must not overlook."""
    warnings = []
    carried = [label for name, label in EXTRA_LABELS.items() if report.extras.get(name)]
    if carried and report.concepts and not report.extras.get("keys"):
        gone = words(concept["name"] for concept in report.concepts)
        if report.moves:
            warnings.append(f"The weights are not all of the edit: without the {words(carried)}, {gone} may be back.")
        else:
            warnings.append(f"The weights did not change: without the {words(carried)}, {gone} is back.")
    if report.extras.get("negative"):
        warnings.append("The negative prompt only acts with guidance, and a user's own negative prompt replaces it.")
    alive = [rate for rate in report.rates if rate["group"] == "implicit" and rate["after"] > ALIVE]
    if len(alive) > HEADED:
        alive.sort(key=lambda rate: rate["after"], reverse=True)
        shares = words((f"{rate['looked_for']} in {percent(rate['after'])}" for rate in alive), HEADED)
        warnings.append(f"Implicit prompts still work: pictures of prompts that do not name it show {shares}.")
        return warnings
    return warnings + [
        f"Implicit prompts still work: of {rate['images']} pictures from prompts that do not name it, "
        f"{percent(rate['after'])} still show {rate['looked_for']} (before the edit {percent(rate['before'])})."
        for rate in alive
    ]


def mean_rates(rates: Iterable[dict[str, Any]], group: str) -> dict[str, Any] | None:
    """Mean hit rates over all pictures of a group; None if there are none."""
    rows = [rate for rate in rates if rate["group"] == group and rate["images"]]
    if not rows:
        return None
    images = sum(row["images"] for row in rows)
    means = {side: sum(row[side] * row["images"] for row in rows) / images for side in ("before", "after")}
    return {"images": images, **means}


def _published(report: Report) -> dict[str, float]:
    """The figures of papers (``audit.metrics.published``); empty where a rate is missing or the concepts differ in
    kind."""
    rates = {group: mean["after"] for group in GROUPS if (mean := mean_rates(report.rates, group))}
    kinds = {concept.get("kind", "") for concept in report.concepts}
    if len(kinds) != 1 or not {"name", "keep"} <= rates.keys():
        return {}
    return published(kinds.pop(), rates["name"], rates["keep"], rates.get("synonym"))


def _bound(check: Check) -> str:
    """Whether the limit is "at most" or "at least", inferred from the outcome; "" if value and limit are equal."""
    if check.limit is None or not math.isfinite(check.value) or check.value == check.limit:
        return ""
    return "at most" if (check.value < check.limit) == check.passed else "at least"


def title(model: dict[str, str]) -> str:
    """The id of a hub model (which has a revision), or the name of a folder without its path."""
    return model["name"] if model.get("revision") else PurePath(model["name"]).name


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: a number that is not finite becomes null, with its name under ``KEY_text``. In a
    list, the name takes its place."""
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for key, item in value.items():
            result[str(key)] = plain(item)
            if isinstance(item, float) and not math.isfinite(item):
                result[str(key)], result[f"{key}_text"] = None, str(float(item))
        return result
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
