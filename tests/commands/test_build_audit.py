"""The option ``--audit`` of a build: the table in the report, gates that reject, and what is refused at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from erasec.audit.suites import SUITES, Suite
from erasec.cli.app import app
from erasec.commands import build, plan
from erasec.commands.audit import Request, audit
from erasec.errors import CheckFailed, ErasecError
from erasec.recipe.recipe import Limits, Recipe, from_flags, from_toml, to_toml
from erasec.reporting.report import Report

QUICK = Limits(images=2, steps=2, erased=99.0, kept=1.0, agreement=2.0)


@pytest.fixture(scope="module", autouse=True)
def small_suite() -> Iterator[None]:
    """A suite of two probes without training, one of which reads the recipe, with two pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "quick", Suite(2, ("prompts", "undo")))
        yield


def make(out: Path, suite: str = "quick", **fields: Any) -> Report:
    values = {"model": "glyphs", "erase": ("star",), "checks": QUICK, "audit": suite, **fields}
    return build.run(plan.make_plan(Recipe(**values), out))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("audited") / "out"
    # Another seed than the default, and steps enough for it to show a star: the command audit must take both over.
    checks = QUICK.model_copy(update={"steps": 6})
    return out, make(out, gate={"prompts": 1.0, "prompts/name": 1.0}, seed=7, checks=checks)


def test_the_report_has_the_table_and_a_check_for_each_gate(built: tuple[Path, Report]) -> None:
    out, report = built
    (facts,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["audits"]
    assert facts["concept"]["name"] == "star" and facts["suite"] == "quick"
    rows = {row["variant"]: row["rates"] for row in facts["readings"] if row["probe"] == "prompts"}
    assert all(row["run"] for row in facts["readings"])
    assert set(rows["name"]) == {"model", "control", "base", "twin", "random"}
    gates = {check.name: check for check in report.checks if check.name.startswith("audit/")}
    assert set(gates) == {"audit/prompts", "audit/prompts/name"} and all(check.passed for check in gates.values())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Audit: star" in page and facts["headline"] in page and "misspelt" in page
    assert "Audit of star, suite quick" in (out / "README.md").read_text(encoding="utf-8")
    assert report.seconds["audit"] > 0


def test_the_command_audit_takes_the_same_rates_from_the_cache(
    built: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasec.audit import bench

    asked: list[str] = []
    monkeypatch.setattr(bench.Bench, "score", lambda self, attempt, *rest: asked.append(attempt.variant))
    report = audit(Request(str(built[0]), suite="quick", limits={}), tmp_path / "audit")
    (facts,) = built[1].audits
    assert asked == []
    assert [row["rates"] for row in report.facts()["readings"]] == [row["rates"] for row in facts["readings"]]


def test_a_gate_that_is_missed_rejects_the_build(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="audit/noised") as caught:
        make(tmp_path / "out", gate={"noised": 1.0})  # no row of the suite has the name
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path / "out") == [".rejected"]
    facts = json.loads((tmp_path / "out" / ".rejected" / "report.json").read_text(encoding="utf-8"))
    assert facts["outcome"] == "rejected" and facts["audits"][0]["outcome"] == "failed"
    (check,) = (check for check in facts["checks"] if check["name"] == "audit/noised")
    assert check["value"] is None and "no row of this audit has the name" in check["how"]


@pytest.mark.parametrize(
    ("suite", "fields", "words"),
    [
        ("quick", {"erase": ("a griffin",)}, "no judge can see a griffin"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_it_is_built(
    tmp_path: Path, suite: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ErasecError, match=words):
        make(tmp_path / "out", suite, **fields)
    assert os.listdir(tmp_path) == []


def test_gates_without_an_audit_are_said_not_to_have_been_measured(tmp_path: Path) -> None:
    report = make(tmp_path / "out", suite="", gate={"prompts": 0.0})
    assert report.audits == () and any("--audit" in note for note in report.notes)
    assert "Audit:" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_command_line_prints_the_headline_of_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def run(made: Any, fresh: bool) -> Report:
        from sample_report import star_report

        asked.append(made.recipe.audit)
        return star_report(audits=({"headline": "Hidden, not erased: 1 of 2 attacks brings star back"},))

    monkeypatch.setattr(build, "run", run)
    done = CliRunner().invoke(app, ["build", "glyphs", "--erase", "star", "--audit", "standard"])
    assert done.exit_code == 0, done.output
    assert asked == ["standard"] and "Hidden, not erased" in done.output


def test_the_key_of_a_recipe_is_written_and_a_flag_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('model = "glyphs"\nerase = ["star"]\naudit = "full"\n')
    assert from_flags(str(tmp_path / "recipe.toml")).audit == "full"
    changed = from_flags(str(tmp_path / "recipe.toml"), audit="quick")
    assert changed.audit == "quick" and from_toml(to_toml(changed)) == changed
    assert "audit" not in to_toml(from_flags("glyphs"))
    with pytest.raises(ErasecError, match="no suite 'quik'"):
        from_flags("glyphs", audit="quik")


def test_a_plan_refuses_an_unknown_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", "glyphs", "--erase", "star", "--audit", "quik"])
    assert done.exit_code == 2 and "quik" in done.output
