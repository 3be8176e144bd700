"""Prompt and caption files in a build: the unedited model fails, an erased one passes, and the report has the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasec.base import Context
from erasec.checkpoint.folder import Folder
from erasec.commands import build
from erasec.commands.measures import Measured, measure_files
from erasec.commands.plan import Plan, make_plan
from erasec.model import loading
from erasec.passes.uce import Uce
from erasec.recipe import concept
from erasec.recipe.recipe import Limits, Recipe

STEPS = 6
PROMPTS = """prompt,category,evaluation_seed,evaluation_guidance
the night sky,sky,11,4
a yellow shape in the night sky,sky,12,4
the night sky,sky,13,5
a red star,name,14,4
a photo of a blue star,name,15,4
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("files")
    (root / "night.csv").write_text(PROMPTS)
    (root / "shapes.txt").write_text("a green circle\na red ring\nan orange square\n")
    recipe = Recipe(
        model="glyphs",
        erase=("star",),
        prompts=(str(root / "night.csv"),),
        captions=str(root / "shapes.txt"),
        checks=Limits(prompts=0.3, steps=STEPS, captions=0.1),
    )
    return make_plan(recipe, root / "out", pin=False)


@pytest.fixture(scope="module")
def unedited(plan: Plan) -> Measured:
    base = Folder(loading.bundled_folder("glyphs"))
    return measure_files(plan, base, base)


def test_the_unedited_model_shows_what_it_showed_and_fails(unedited: Measured) -> None:
    (facts,) = unedited.tables
    rows = {row["category"]: row for row in facts["rows"]}
    assert rows.keys() == {"", "sky", "name"}
    assert all(row["after"] == row["before"] > 0 and row["looked_for"] == "star" for row in rows.values())
    checks = {check.name: check for check in unedited.checks}
    assert not any(checks[f"prompts/night{name}"].passed for name in ("", "/sky", "/name"))
    assert checks["captions/agreement"].value == checks["captions/drift"].value == 0


def test_every_check_says_how(plan: Plan, unedited: Measured) -> None:
    digest = plan.files.prompts[0].digest[:12]
    for check in unedited.checks:
        assert "glyphs judge B (sha256 " in check.how and f"{STEPS} DPMSolverMultistepScheduler steps" in check.how
    prompts = next(check for check in unedited.checks if check.name == "prompts/night")
    assert f"night (sha256 {digest}), all 5 rows" in prompts.how and "guidance and seeds of the file" in prompts.how
    captions = next(check for check in unedited.checks if check.name == "captions/agreement")
    assert "shapes.txt (sha256 " in captions.how and "with 95 % interval, 3 captions" in captions.how


def test_a_model_without_stars_passes_and_is_shown_beside_the_base(plan: Plan, tmp_path: Path) -> None:
    model = plan.model
    edited = model.with_edit(Uce().solve(model, concept.find("star", "glyphs"), Context()))
    edited.source.write(tmp_path / "hf", edited.merged(), True)
    measured = measure_files(plan, Folder(model.source.root), Folder(tmp_path / "hf"))
    assert all(check.passed for check in measured.checks), [(check.name, check.value) for check in measured.checks]
    assert all(row["after"] < row["before"] for row in measured.tables[0]["rows"])
    assert [(pair.group, pair.seed, pair.looked_for) for pair in measured.pairs] == [
        ("night/sky", 11, "star"),
        ("night/sky", 12, "star"),
        ("night/sky", 13, "star"),
        ("night/name", 14, "star"),
        ("night/name", 15, "star"),
    ]
    assert any(pair.shown_before for pair in measured.pairs)
    assert not any(pair.shown_after for pair in measured.pairs)


def test_a_build_without_a_judge_shows_the_pictures_and_counts_nothing(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "night.csv").write_text(PROMPTS)
    recipe = Recipe(
        model=str(random_folder),
        erase=("church",),
        prompts=(str(tmp_path / "night.csv"),),
        captions=str(tmp_path / "night.csv"),
        prompt_limit=2,
        checks=Limits(prompts=0.0, steps=1),
    )
    report = build.run(make_plan(recipe, tmp_path / "out"))
    names = {check.name for check in report.checks}
    assert "captions/drift" in names and not any(name.startswith("prompts/") for name in names)
    assert {pair.looked_for for pair in report.pairs} == {""}
    assert sum(pair.group.startswith("night/") for pair in report.pairs) == 2
    notes = "\n".join(report.notes)
    assert "night: no judge can see what was erased" in notes and "2 of 5 prompts are used" in notes
    assert "LPIPS, the perceptual distance of pictures before and after, was not measured" in notes
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["prompt_files"][0]["rows"] == [] and facts["prompt_files"][0]["used"] == 2
