"""Writes what an audit measured: audit.html for readers, audit.json for programs.

The headline follows from the readings alone, the outcome from the gates alone. An audit without gates did not pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from erasec import registry
from erasec.audit.base import PLAIN, ROLES, THREATS, Rate, Reading, plain_seeds
from erasec.audit.gates import Gate, model_rate
from erasec.audit.metrics import removal_rate
from erasec.errors import ErasecError
from erasec.reporting.report import png, templates, write_text

if TYPE_CHECKING:
    from erasec.base import Role

Outcome = Literal["passed", "failed", "no gates"]
# "not found": no attack brought the concept back, and at least one would have shown it in the base.
Verdict = Literal["not erased", "hidden", "not found", "not judged"]

ACRONYMS = {"lora": "LoRA", "mma": "MMA", "p4d": "P4D"}
SCHEMA = "audit/1"
GALLERY = 6  # rows whose pictures the page shows
PAIRS = 8  # pictures of what the model draws instead
# What the audited model is compared with, in the words of the headline.
BEYOND: dict[Role, str] = {
    "twin": "the model that never saw it",
    "random": "an untrained model",
    "control": "its random control",
}
COLUMNS: tuple[tuple[Role, str], ...] = (
    ("model", "Model"),
    ("base", "Base"),
    ("twin", "Twin"),
    ("random", "Untrained"),
    ("control", "Control"),
)


@dataclass(frozen=True)
class AuditReport:
    """Everything that the page of an audit shows.

    ``model``, ``base`` and ``twin`` have a name, a family and a digest. ``concept`` has the fields of Concept.
    ``suite`` is "" where the probes were named one by one. ``settings`` are images, steps, guidance, seed and device.
    ``judges`` are the scorer and the selector, with title and digest. ``notion`` is one sentence about the kind of the
    erasure. ``alternatives`` says what the model draws instead (see ``audit.instead.alternatives``); all of
    its keys may be left out.
    ``seconds`` are those of the audit, by step.
    """

    model: Mapping[str, str]
    base: Mapping[str, str] | None
    twin: Mapping[str, str] | None
    concept: Mapping[str, Any]
    suite: str
    settings: Mapping[str, Any]
    judges: Mapping[str, Mapping[str, str] | None]
    readings: tuple[Reading, ...]
    gates: tuple[Gate, ...] = ()
    notion: str = ""
    alternatives: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What the gates say: "no gates" is neither passed nor failed."""
        if any(gate.outcome != "passed" for gate in self.gates):
            return "failed"
        return "passed" if self.gates else "no gates"

    @property
    def run(self) -> tuple[Reading, ...]:
        """The attacks in which pictures of the audited model were counted."""
        return tuple(row for row in self.readings if model_rate(row) is not None and not row.diagnostic)

    @property
    def verdict(self) -> Verdict:
        """What the readings say."""
        back = [reading for reading in self.run if reading.brings_back]
        if back:
            return "not erased" if any((row.probe, row.variant) == PLAIN for row in back) else "hidden"
        return "not found" if any(reading.separates for reading in self.run) else "not judged"

    @property
    def headline(self) -> str:
        """The verdict as one sentence."""
        name, run = self.concept["name"], self.run
        back = sum(reading.brings_back for reading in run)
        counted = f"{back} of {len(run)} attacks bring{'s' if back == 1 else ''}"
        if self.verdict == "not erased":
            return f"Not erased: prompts that name {name} still show it, and {counted} it back"
        if self.verdict == "hidden":
            return f"Hidden, not erased: {counted} {name} back"
        if self.verdict == "not found":
            roles = {role for row in run if row.separates and (role := row.floor)}
            beyond = BEYOND[roles.pop()] if len(roles) == 1 else "a model or a control that cannot know it"
            return f"No attack that separates brings {name} back more than {beyond}"
        if not run:
            return "Not judged: no attack was run"
        return f"Not judged: no attack tells a model that draws {name} from one that does not"

    def facts(self) -> dict[str, Any]:
        """Everything except the pictures, as JSON can hold it. A number that is not finite is None."""
        alternatives = {key: value for key, value in (self.alternatives or {}).items() if key != "pictures"}
        plain: dict[str, Any] = _plain(
            {
                "erasec": SCHEMA,
                "verdict": self.verdict,
                "headline": self.headline,
                "outcome": self.outcome,
                "model": self.model,
                "base": self.base,
                "twin": self.twin,
                "concept": self.concept,
                "suite": self.suite,
                "settings": self.settings,
                "judges": self.judges,
                "readings": [_row(reading, self.readings) for reading in self.readings],
                "counts": {
                    "run": len(self.run),
                    "bring_back": sum(reading.brings_back for reading in self.run),
                    "do_not_separate": sum(reading.separates is False for reading in self.run),
                    "not_run": sum(model_rate(reading) is None for reading in self.readings),
                },
                "gates": [asdict(gate) for gate in self.gates],
                "notion": self.notion,
                "alternatives": alternatives or None,
                "seconds": self.seconds,
                "environment": self.environment,
                "notes": self.notes,
            }
        )
        return plain


def write_audit(report: AuditReport, folder: Path) -> None:
    """Write ``audit.html`` and ``audit.json`` into ``folder``. Each is written completely or not at all, and the same
    audit gives the same bytes."""
    facts = report.facts()
    document = json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n"
    environment = templates()
    environment.filters |= {"spread": spread, "words_of": words_of}
    present = {role for reading in facts["readings"] for role in reading["rates"]}
    page = environment.get_template("audit.html.j2").render(
        facts,
        threats=_by_threat(facts["readings"]),
        not_run=[row for row in facts["readings"] if not row["run"]],
        columns=[column for column in COLUMNS if column[0] in present],
        roles=ROLES,
        about_threats=THREATS,
        about=_about(report.readings),
        by_name=next(
            (row for row in facts["readings"] if (row["probe"], row["variant"]) == PLAIN and row["run"]), None
        ),
        gallery=_gallery(report.run),
        instead=_instead(report.alternatives),
        curve=_curve(facts["readings"]),
        seeds_shown=any(reading["plain_seeds"] for reading in facts["readings"]),
        spent=_spent(report.readings),
        none_of=none_of(report.run),
        beyond=BEYOND,
    )
    write_text(folder / "audit.html", page)
    write_text(folder / "audit.json", document)


# --- what a row says -------------------------------------------------------------------------------------------------


def _row(reading: Reading, readings: Sequence[Reading] = ()) -> dict[str, Any]:
    """The facts of a row. A rate of no pictures is None, not 0."""
    seeds = plain_seeds(reading, readings)
    return {
        "probe": reading.probe,
        "variant": reading.variant,
        "threat": reading.threat,
        "run": model_rate(reading) is not None,
        "obstacle": reading.obstacle or ("" if model_rate(reading) else "no picture of the audited model was counted"),
        "rates": {role: _rate(rate) for role, rate in reading.rates.items()},
        "reference": reading.floor,
        "separates": reading.separates,
        "brings_back": reading.brings_back,
        "diagnostic": reading.diagnostic,
        "nrr": _removed(reading),
        "plain_seeds": _rate(seeds) if seeds is not None else None,
        "prompts": reading.prompts or None,
        "budget": reading.budget,
        "seconds": reading.seconds,
        "measured": dict(reading.measured),
        "note": reading.note,
    }


def _removed(reading: Reading) -> float | None:
    """NRR of a row: the share of what the base shows under the same attack that is gone; None where the base shows
    nothing, or was not measured."""
    rates = reading.rates
    if "model" not in rates or "base" not in rates or not rates["base"].hits:
        return None
    return removal_rate(rates["base"].value, rates["model"].value)


def _rate(rate: Rate) -> dict[str, float | None]:
    low, high = rate.interval
    known = {"rate": rate.value, "low": low, "high": high} if rate.count else dict.fromkeys(("rate", "low", "high"))
    return {"hits": rate.hits, "count": rate.count, **known}


def none_of(readings: Sequence[Reading]) -> dict[str, float]:
    """The smallest number of pictures of a rate, and the upper end of the interval where none of them is a hit."""
    count = min((rate.count for reading in readings if (rate := model_rate(reading))), default=0)
    return {"count": count, "high": Rate(0, count).interval[1]}


# --- what the page shows ---------------------------------------------------------------------------------------------


def _by_threat(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """The rows that were run, by threat, the weakest attacker first, and by probe in the order of the readings."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {threat: {} for threat in THREATS}
    for row in rows:
        if row["run"]:
            groups.setdefault(row["threat"], {}).setdefault(row["probe"], []).append(row)
    return [(threat, probes) for threat, probes in groups.items() if probes]


def _about(readings: Sequence[Reading]) -> dict[str, dict[str, str]]:
    """The summary, the limits and the paper of every probe by name, "" for a probe that is not registered."""
    known, about = registry.probes(), {}
    for name in dict.fromkeys(reading.probe for reading in readings):
        about[name] = {"summary": "", "limits": "", "paper": ""}
        if name in known:
            try:
                probe = registry.load_probe(name)
            except ErasecError:  # another package's probe, which was measured where it could be imported
                continue
            about[name] = {key: str(getattr(probe, key)) for key in about[name]}
    return about


def _gallery(run: Sequence[Reading]) -> list[dict[str, Any]]:
    """The first pictures of the rows with the highest rates of the audited model."""
    shown = [
        (rate, reading)
        for reading in run
        if (rate := model_rate(reading)) and reading.shown is not None and len(reading.shown)
    ]
    shown.sort(key=lambda item: -item[0].value)
    return [
        {**_row(reading), "pictures": [png(picture) for picture in reading.shown]}
        for _, reading in shown[:GALLERY]
        if reading.shown is not None
    ]


def _instead(alternatives: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Pictures of the audited model of prompts that name the concept, with those of the base where it has them."""
    pictures = dict((alternatives or {}).get("pictures") or {})
    columns = {role: pictures[role] for role in ("base", "model") if pictures.get(role) is not None}
    count = min((len(images) for images in columns.values()), default=0)
    return [{role: png(images[at]) for role, images in columns.items()} for at in range(min(count, PAIRS))]


def _curve(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows along the edit, by the share of it that each has; of several such probes, those of the first."""
    found = [row for row in rows if row["diagnostic"] and row["run"] and row["measured"].get("share") is not None]
    by_share = {row["measured"]["share"]: row for row in reversed(found)}
    return [by_share[share] for share in sorted(by_share)] if len(by_share) > 1 else []


def _spent(readings: Sequence[Reading]) -> dict[str, float]:
    """The seconds of all subjects by probe. A result of the cache counts what it took when it was measured."""
    spent: dict[str, float] = {}
    for reading in readings:
        if reading.seconds > 0 and math.isfinite(reading.seconds):
            spent[reading.probe] = spent.get(reading.probe, 0.0) + reading.seconds
    return spent


def spread(rate: Mapping[str, float]) -> str:
    """The interval of a rate in whole percents, rounded outwards, such as "3–26 %"."""
    low, high = math.floor(100 * rate["low"] + 1e-9), math.ceil(100 * rate["high"] - 1e-9)
    return f"{low}–{high}\u00a0%"


def words_of(name: str) -> str:
    """The name of a probe as words: "latent_guidance" is "Latent guidance"."""
    if name in ACRONYMS:
        return ACRONYMS[name]
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
