"""What a build tells people: report.html to look at, report.json for machines, README.md as the model card."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from erasec.checkpoint import atomic
from erasec.model import HUB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from erasec.base import Check


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed before and after; images are (h, w, 3) uint8. ``shown_*`` says whether the judge saw
    what ``looked_for`` names."""

    group: str  # "name", "synonym", "implicit" or "keep"
    prompt: str
    seed: int
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    looked_for: str
    shown_before: bool
    shown_after: bool


@dataclass(frozen=True)
class SiteMove:
    """How far one site moved: the Frobenius norm of the change over that of the weight, and the change's rank."""

    key: str
    block: str
    attn: str
    proj: str
    shape: tuple[int, ...]
    change: float
    rank: int


@dataclass(frozen=True)
class Applied:
    """One pass on one concept."""

    by: str
    version: str
    paper: str
    concept: str
    params: dict[str, Any]
    stats: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Written:
    """One artifact; ``files`` maps its relative paths to (bytes, sha256)."""

    target: str
    path: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Report:
    """Everything a report shows. ``passed`` is False where any check failed."""

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


SCHEMA = "erasec.report/1"
GROUPS: dict[str, tuple[str, str]] = {
    "name": ("By name", "prompts that name what was erased"),
    "synonym": ("By synonym", "prompts that use its other names"),
    "implicit": ("Implicit prompts", "prompts that show it without naming it"),
    "keep": ("Kept", "prompts for other things, which must stay as they were"),
}
SHOWN, SHOWN_KEPT = 8, 12
SIDE = 320  # pixels; larger pictures are reduced, or a report on 512 px pictures would weigh 40 MB
ALIVE = 0.10  # an implicit hit rate above this is said in words

STATS = {
    "condition": "condition number of the solved matrix: by how much it can magnify rounding errors",
    "sigma_min": "smallest singular value of the map on text states: 1 leaves a direction as it was, 0 deletes it",
    "sigma_max": "largest singular value of the map on text states: how far it stretches a direction",
    "erased_residual": "what is left of the erased text states' distance to their anchor: 0 is exact",
    "keep_drift": "relative change of the text states that must stay: 0 is untouched",
    "rank": "independent directions in which each weight matrix changed",
    "rows_erased": "text states that were moved to the anchor",
    "rows_kept": "text states that were held in place",
    "ridge": "regularisation added to the diagonal: more moves less",
}


def write(report: Report, out: Path) -> None:
    """Write ``report.html``, ``report.json`` and ``README.md`` below ``out``, each whole or not at all.

    The same report gives the same bytes.
    """
    facts = _facts(report)
    environment = Environment(
        loader=FileSystemLoader(str(resources.files("erasec") / "templates")),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": _percent, "number": _number, "data": _data, "size": _size, "duration": _duration, "words": _words,
        "markdown": _markdown,
    }  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        facts, gallery=_gallery(report), heat=_heat(report.moves), groups=GROUPS, stats=STATS, side=SIDE,
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
        "moves": [asdict(move) for move in report.moves],
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
        return f"build rejected: {_words(failed, most=3)} failed" if failed else "build rejected"
    names = [concept["name"] for concept in report.concepts]
    if not names:
        return f"{model} built, nothing erased"
    judged = any(check.name.startswith("erased") and check.limit is not None for check in report.checks)
    seen = {rate["looked_for"] for rate in report.rates if rate["group"] == "name"} if judged else set()
    measured = [c["name"] for c in report.concepts if seen & {c["name"], c.get("label") or c["name"]}]
    rest = [name for name in names if name not in measured]
    if not measured:
        return f"{model} edited; whether {_words(names)} is gone was not measured"
    unmeasured = f"; {_words(rest)} not measured" if rest else ""
    return f"{_words(measured)} erased from {model}{unmeasured}"


def _warnings(report: Report) -> list[str]:
    """What was measured and must not be overlooked, in words."""
    return [
        f"This method leaves implicit prompts alive: of {rate['images']} pictures from prompts that never name it, "
        f"{_percent(rate['after'])} still show {rate['looked_for']} (before the edit {_percent(rate['before'])})."
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


# --- pictures and the heat map -------------------------------------------------------------------------------------


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


def _heat(moves: tuple[SiteMove, ...]) -> dict[str, Any]:
    """Moves as a table: blocks in network order, a column for each kind of site that there is."""
    kinds = {(move.attn, move.proj) for move in moves}
    columns = sorted(kinds, key=lambda kind: (kind[0] != "cross", "k v q out".find(kind[1]), kind))
    cells = {(move.block, move.attn, move.proj): move for move in moves}
    blocks = sorted({move.block for move in moves}, key=_network_order)
    rows = [(block, [cells.get((block, *kind)) for kind in columns]) for block in blocks]
    return {"columns": columns, "rows": rows, "most": max((move.change for move in moves), default=0.0)}


def _network_order(block: str) -> tuple[int, list[int], str]:
    stage = next((at for at, name in enumerate(("down", "mid", "up")) if block.startswith(name)), 3)
    return stage, [int(digits) for digits in re.findall(r"\d+", block)], block


# --- numbers and words for people ----------------------------------------------------------------------------------


def _percent(rate: float) -> str:
    if not math.isfinite(rate):
        return _number(rate)
    if 0 < rate < 0.0005 or 0.9995 < rate < 1:
        return "under 0.1\u00a0%" if rate < 0.5 else "over 99.9\u00a0%"
    return f"{100 * rate:.1f}".removesuffix(".0") + "\u00a0%"


def _number(value: float) -> str:
    """Four significant digits; ``1.2 × 10^-7`` where there would be many zeros."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "−infinite")
    digits, _, power = f"{value:.2e}".partition("e")
    text = f"{float(digits):g} × 10^{int(power)}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text.replace("-", "−")


def _data(value: float, text: str) -> Markup:
    """``text`` for people around the very number for machines."""
    shown = Markup(re.sub(r"\^(\S+)", r"<sup>\1</sup>", str(escape(text))))
    return Markup('<data value="{}">{}</data>').format(float(value) if isinstance(value, float) else value, shown)


def _size(count: float) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 3)
    return f"{float(f'{count / 1000**power:.3g}'):g} {('B', 'kB', 'MB', 'GB')[power]}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def _words(items: Iterable[str], most: int = 8) -> str:
    """Such as "a, b and c"; beyond ``most``, how many more."""
    items = list(items)
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def _markdown(text: object) -> str:
    """One line of plain text that stays plain in a Markdown table."""
    line = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(str(text).split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
