"""The lists and the plan as the command line prints them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from sample_report import star_report

from erasec import registry
from erasec.cli import output
from erasec.commands import plan
from erasec.recipe.recipe import from_flags
from erasec.reporting.facts import facts_of


@dataclass(frozen=True)
class Row:
    steps: int = 3

    name = "row"
    summary = "a pass of this test"
    paper = "arXiv:0"
    when = ""


def test_a_pass_says_when_to_use_it_and_for_which_kinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uce = registry.load_pass("uce")
    monkeypatch.setattr(registry, "passes", lambda: {"row": "", "uce": ""})
    monkeypatch.setattr(registry, "load_pass", lambda name: uce if name == "uce" else Row)
    output.passes()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "row a pass of this test arXiv:0 steps=3"
    assert lines[2].startswith("uce ") and "rows=tail" in lines[2]
    assert lines[3] == f"{uce.when}; the default for concepts of kind none, object, person, style"
    assert len(lines) == 4


def test_a_concept_is_listed_with_the_default_pass_for_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    output.concepts()
    words = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()}
    assert words["van-gogh"] == ["style", "uce"] and words["nudity"] == ["safety", registry.DEFAULTS["safety"]]


def test_a_plan_says_why_a_pass_is_used(
    random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for passes, is_default in (((), True), (("rece",), False)):
        recipe = from_flags(str(random_folder), erase=["church"], passes=passes, device="cpu")
        output.print_plan(plan.describe(plan.make_plan(recipe, pin=False)))
        assert ("the default for concepts of kind object\n" in capsys.readouterr().out) is is_default


def test_a_plan_names_its_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = from_flags("glyphs", erase=["star"], device="cpu")
    output.print_plan(plan.describe(plan.make_plan(recipe, pin=False)))
    assert " judge  glyphs judge B\n" in capsys.readouterr().out


def test_a_runtime_is_listed_with_the_targets_that_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    output.runtimes()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["runtime", *registry.RUNTIMES]
    assert {line[0]: line[-1] for line in lines}["ort"] == "onnx"


def test_options_are_listed_with_their_ranges() -> None:
    text = output.options(registry.load_pass("esd"))
    assert "sample_steps=" in text and ">= 1" in text


def test_a_verdict_has_a_line_for_each_prompt_file_and_label() -> None:
    rows = [
        {"category": "", "looked_for": "star", "images": 40, "before": 0.815, "after": 0.0625},
        {"category": "sky", "looked_for": "star", "images": 16, "before": 1.0, "after": 0.5},
    ]
    files = ({"file": "night\x1b[1m", "rows": rows}, {"file": "unseen", "rows": []})
    first, *lines = output.verdict(facts_of(star_report(prompt_files=files))).splitlines()
    assert first.startswith("passed all ") and lines == ["night\\x1b[1m: star in 82% -> 6% of 40 pictures"]
