"""What a build tells people: report.html to look at, report.json for machines, README.md as the model card."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from erasec.checkpoint.safetensors import atomic
from erasec.model.view import HUB
from erasec.reporting import charts
from erasec.reporting.wording import FILTERS, percent, words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from erasec.base import Check


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed before and after; images are (h, w, 3) uint8. ``shown_*`` says whether the judge saw
    what ``looked_for`` names."""

    group: str  # "name", "synonym", "implicit", "keyed" or "keep"
    prompt: str
    seed: int
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    looked_for: str
    shown_before: bool
    shown_after: bool


@dataclass(frozen=True)
class SiteMove:
    """How far one site moved: the Frobenius norms of its weight and of the change, and the change's rank."""

    key: str
    block: str
    attn: str
    proj: str
    shape: tuple[int, ...]
    size: float
    moved: float
    rank: int

    @property
    def change(self) -> float:
        """``moved`` over ``size``."""
        return charts.relative(self.moved, self.size)


@dataclass(frozen=True)
class Applied:
    """One pass on one concept; ``limits`` is what the pass says of itself, ``curves`` are measurements by step."""

    by: str
    version: str
    paper: str
    concept: str
    params: dict[str, Any]
    stats: dict[str, float]
    seconds: float
    limits: str = ""
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """One artifact; ``files`` maps its relative paths to (bytes, sha256)."""

    target: str
    path: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Report:
    """Everything a report shows. ``passed`` is False where any check failed.

    ``extras`` is what the build carries beside weights: "memories", each a dict of attention, mode, rows, weight and
    until; "tokens", the names of new ones; "negative", a prompt; and "keys", the concepts whose keys are in the build.
    What there is none of may be left out.
    """

    model: dict[str, str]  # name, revision, family, digest
    concepts: tuple[dict[str, Any], ...]  # the Concept fields
    applied: tuple[Applied, ...]
    moves: tuple[SiteMove, ...]
    checks: tuple[Check, ...]
    pairs: tuple[Pair, ...]
    rates: tuple[dict[str, Any], ...]  # prompt group, looked_for, images, before, after: hit rates in [0, 1]
    written: tuple[Written, ...]
    seconds: dict[str, float]  # by step of the build
    environment: dict[str, str]  # erasec, python, torch, diffusers, ... versions
    notes: tuple[str, ...]  # sentences a reader must know, such as "no judge: erasure was not measured"
    passed: bool
    extras: dict[str, Any] = field(default_factory=dict)


SCHEMA = "erasec.report/1"
GROUPS: dict[str, tuple[str, str]] = {
    "name": ("By name", "prompts that name what was erased"),
    "synonym": ("By synonym", "prompts that use its other names"),
    "implicit": ("Implicit prompts", "prompts that show it without naming it"),
    "keyed": ("With the key", "the same prompts with the key attached, which brings the concept back"),
    "keep": ("Kept", "prompts for other things, which must stay as they were"),
}
CARRIED = {"memories": "memory", "tokens": "new tokens", "negative": "negative prompt"}
SHOWN, SHOWN_KEPT = 8, 12
SIDE = 320  # pixels; larger pictures are reduced, or a report on 512 px pictures would weigh 40 MB
ALIVE = 0.10  # an implicit hit rate above this is said in words


def write(report: Report, out: Path) -> None:
    """Write ``report.html``, ``report.json`` and ``README.md`` below ``out``, each whole or not at all.

    The same report gives the same bytes.
    """
    facts = _facts(report)
    environment = Environment(
        loader=FileSystemLoader(str(resources.files("erasec.reporting") / "templates")),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= FILTERS
    page = environment.get_template("report.html.j2").render(
        facts, gallery=_gallery(report), groups=GROUPS, side=SIDE, alive=ALIVE, charts=charts,
        heat=charts.heat(report.moves),
        reduced=any(max(pair.before.shape[:2]) > SIDE for pair in report.pairs),
    )  # fmt: skip
    base_model = HUB.get(report.model["name"], _title(report.model))
    card = environment.get_template("card.md.j2").render(facts, groups=GROUPS, base_model=base_model)
    _write_text(out / "report.html", page)
    _write_text(out / "report.json", json.dumps(_plain(facts), indent=2, sort_keys=True, allow_nan=False) + "\n")
    _write_text(out / "README.md", card)


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


# --- the facts: the one source of all three files ------------------------------------------------------------------


def _facts(report: Report) -> dict[str, Any]:
    """Everything but the pictures, as dicts and lists; numbers are the report's own."""
    failed = [check.name for check in report.checks if not check.passed]
    return {
        "schema": SCHEMA,
        "passed": report.passed,
        "verdict": _verdict(report, failed),
        "failed": failed,
        "notes": list(report.notes),
        "warnings": _warnings(report),
        "model": {**report.model, "title": _title(report.model)},
        "concepts": [dict(concept) for concept in report.concepts],
        "summary": {group: found for group in GROUPS if (found := _mean(report.rates, group))},
        "rates": [dict(rate) for rate in report.rates],
        "checks": [{**asdict(check), "state": _state(check), "bound": _bound(check)} for check in report.checks],
        "pairs": [
            {field.name: getattr(pair, field.name) for field in fields(pair) if field.name not in ("before", "after")}
            for pair in report.pairs
        ],
        "applied": [asdict(applied) for applied in report.applied],
        "moves": [{**asdict(move), "change": move.change} for move in report.moves],
        "extras": {"memories": [], "tokens": [], "negative": "", "keys": [], **report.extras},
        "written": [
            {"target": written.target, "path": written.path, "bytes": sum(size for size, _ in written.files.values()),
             "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in written.files.items()}}
            for written in report.written
        ],
        "seconds": dict(report.seconds),
        "environment": dict(report.environment),
    }  # fmt: skip


def _verdict(report: Report, failed: list[str]) -> str:
    """One line. Only what a judge looked for, and a check held to a limit, is called erased."""
    model = _title(report.model)
    if not report.passed:
        return f"build rejected: {words(failed, most=3)} failed" if failed else "build rejected"
    names = [concept["name"] for concept in report.concepts]
    keys = report.extras.get("keys")
    model += f" with the key of {words(keys)}" if keys else ""
    if not names:
        return model if keys else f"{model} built, nothing erased"
    judged = {check.name for check in report.checks if check.name.startswith("erased") and check.limit is not None}
    seen = {rate["looked_for"] for rate in report.rates if rate["group"] == "name"} if judged else set()
    marked = any(rate["group"] == "implicit" for rate in report.rates)  # no prompt names a mark
    measured = [
        c["name"] for c in report.concepts
        if (marked and "erased/implicit" in judged if c.get("kind") == "mark" else seen & {c["name"], c.get("label")})
    ]  # fmt: skip
    rest = [name for name in names if name not in measured]
    if not measured and marked and all(c.get("kind") == "mark" for c in report.concepts):
        return f"{model} edited; how much of {words(names)} is left was measured, and held to no limit"
    if not measured:
        return f"{model} edited; whether {words(names)} is gone was not measured"
    unmeasured = f"; {words(rest)} not measured" if rest else ""
    done = "erased from" if report.moves else "kept out of"
    return f"{words(measured)} {done} {model}{unmeasured}"


def _warnings(report: Report) -> list[str]:
    """What was measured, or is so by construction, and must not be overlooked, in words."""
    found = []
    carried = [said for name, said in CARRIED.items() if report.extras.get(name)]
    if carried and report.concepts and not report.extras.get("keys"):
        gone = words(concept["name"] for concept in report.concepts)
        if report.moves:
            found.append(f"The weights are a part of it: without this build's {words(carried)}, {gone} may be back.")
        else:
            found.append(f"Nothing in the weights changed: without this build's {words(carried)}, {gone} is back.")
    if report.extras.get("negative"):
        found.append("The negative prompt acts under guidance alone, and one of the user's own takes its place.")
    return found + [
        f"This build leaves implicit prompts alive: of {rate['images']} pictures from prompts that never name it, "
        f"{percent(rate['after'])} still show {rate['looked_for']} (before the edit {percent(rate['before'])})."
        for rate in report.rates
        if rate["group"] == "implicit" and rate["after"] > ALIVE
    ]


def _mean(rates: Iterable[dict[str, Any]], group: str) -> dict[str, Any] | None:
    """Hit rates over all pictures of a group, whatever was looked for; None where there are none."""
    rows = [rate for rate in rates if rate["group"] == group and rate["images"]]
    if not rows:
        return None
    images = sum(row["images"] for row in rows)
    means = {at: sum(row[at] * row["images"] for row in rows) / images for at in ("before", "after")}
    return {"images": images, **means}


def _state(check: Check) -> str:
    return "failed" if not check.passed else "told" if check.limit is None else "passed"


def _bound(check: Check) -> str:
    """Which side of its limit is good: a check does not say, but its outcome does, unless value and limit are equal."""
    if check.limit is None or not math.isfinite(check.value) or check.value == check.limit:
        return ""
    return "at most" if (check.value < check.limit) == check.passed else "at least"


def _title(model: dict[str, str]) -> str:
    """A hub id in full (it has a revision); of a folder only its own name."""
    return model["name"] if model.get("revision") else PurePath(model["name"]).name


def _plain(value: Any) -> Any:
    """``value`` for JSON: a number that is not finite becomes null, with its name under ``<key>_text`` (or in its
    place, inside a list)."""
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            plain[str(key)] = _plain(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[str(key)], plain[f"{key}_text"] = None, str(float(item))
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


# --- pictures --------------------------------------------------------------------------------------------------------


def _gallery(report: Report) -> list[dict[str, Any]]:
    """Groups of pairs in the order they were made: the first few of each, never a selection."""
    sections = []
    for group in dict.fromkeys([*GROUPS, *(pair.group for pair in report.pairs)]):
        pairs = [pair for pair in report.pairs if pair.group == group]
        shown = pairs[: SHOWN_KEPT if group == "keep" else SHOWN]
        if pairs:
            title, about = GROUPS.get(group, (group, ""))
            items = [(pair, _png(pair.before), _png(pair.after)) for pair in shown]
            sections.append({"group": group, "title": title, "about": about, "total": len(pairs), "items": items})
    return sections


def _png(image: NDArray[np.uint8]) -> str:
    """A data URI."""
    picture = Image.fromarray(image)
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "PNG")  # optimize=True takes eight times as long and saves a twentieth
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
