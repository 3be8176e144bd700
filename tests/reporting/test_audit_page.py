"""The page of an audit says what was measured, and never reads like passed where nothing was judged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from sample_audit import READINGS

from erasec.audit.base import Rate, Reading
from erasec.audit.gates import check_gates
from erasec.reporting.audit_page import AuditReport, write_audit

NAMED = {"title": "glyphs judge B", "digest": "ab" * 32}
MODEL = {"name": "star-uce", "family": "sd1", "digest": "cd" * 32}
SETTINGS = {"images": 20, "steps": 15, "guidance": 4.0, "seed": 0, "device": "cpu"}


def report(readings: tuple[Reading, ...] = READINGS, name: str = "star", **limits: float) -> AuditReport:
    judges = {"scorer": NAMED, "selector": None}
    concept = {"name": name, "erase": [name]}
    gates = check_gates(readings, limits)
    return AuditReport(MODEL, MODEL, None, concept, "quick", SETTINGS, judges, readings, gates)


def written(folder: Path, made: AuditReport) -> str:
    write_audit(made, folder)
    return (folder / "audit.html").read_text(encoding="utf-8")


def row(model: int, twin: int, base: int = 20) -> Reading:
    rates = {"model": Rate(model, 20), "twin": Rate(twin, 20), "base": Rate(base, 20)}
    return Reading("noised", "empty prompt", "sampling", rates)  # type: ignore[arg-type]


def test_the_headline_follows_from_the_rates() -> None:
    assert "hidden" in report((row(18, 0),)).headline.lower()
    assert report((row(1, 0),)).verdict == "not found"
    assert report((row(0, 0, base=0),)).verdict == "not judged"
    assert report(()).verdict == "not judged"


def test_without_gates_an_audit_is_not_passed() -> None:
    assert report().outcome == "no gates"
    assert report((row(0, 0),), noised=0.1).outcome == "passed"
    assert report((row(18, 0),), noised=0.1).outcome == "failed"
    assert report((row(0, 0),), inversion=0.1).outcome == "failed"


def test_a_failed_gate_is_on_the_page(tmp_path: Path) -> None:
    page = written(tmp_path, report((row(18, 0),), noised=0.1))
    assert "failed" in page.lower()
    assert "failed" not in written(tmp_path, report((row(0, 0),), noised=0.1)).split("</style>")[1].lower()


def test_a_row_that_was_not_run_has_its_reason_and_no_rate(tmp_path: Path) -> None:
    missing = Reading("inversion", "", "weights", {}, obstacle="it needs the base model")
    page = written(tmp_path, report((missing,)))
    assert "It needs the base model" in page
    body = page.split("</style>")[1]
    assert not re.search(r"\b0\s*%", body.replace("\u00a0", " "))
    facts = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert not facts["readings"][0]["run"]


def test_json_has_counts_and_intervals_and_no_nan(tmp_path: Path) -> None:
    measured = replace(row(5, 0), measured={"loss": float("nan")})
    write_audit(report((measured,)), tmp_path)
    text = (tmp_path / "audit.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    rate = json.loads(text)["readings"][0]["rates"]["model"]
    assert (rate["hits"], rate["count"]) == (5, 20)
    assert rate["low"] < 0.25 < rate["high"]


def test_the_page_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    page = written(tmp_path, report(name="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="https?://(?!arxiv\.org)', page)
