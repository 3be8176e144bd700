"""examples/my_judge.py, found by the registry and asked by a build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from erasec import registry
from erasec.base import Judge
from erasec.commands import build
from erasec.commands.plan import make_plan
from erasec.errors import CheckFailed
from erasec.glyphs import world
from erasec.model import loading
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits, NamedOptions, Recipe, from_file, from_flags

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def name(root: Path) -> str:
    """What a user types after --judge."""
    return f"{root / 'examples' / 'my_judge.py'}:ColourJudge"


@pytest.fixture(scope="module")
def judge(name: str) -> Judge:
    judge = registry.judge_for(loading.load("glyphs"), name)
    assert judge is not None
    return judge


def test_it_sees_the_colours_of_rendered_pictures(judge: Judge) -> None:
    """On renders, whose colours are known, it makes no mistake in either direction."""
    samples = [world.sample(5, index) for index in range(400)]
    images = np.stack([sample.image for sample in samples])
    for colour in COLOURS:
        truth = [any(glyph.colour == colour for glyph in sample.glyphs) for sample in samples]
        assert 20 < sum(truth) < 200
        assert judge.sees(images, [colour] * len(images)).tolist() == truth


def test_pictures_agree_with_prompts_that_name_their_colour(judge: Judge) -> None:
    samples = [sample for index in range(200) if len((sample := world.sample(6, index)).glyphs) == 1]
    red = np.stack([sample.image for sample in samples if sample.glyphs[0].colour == "red"])
    assert len(red) > 5
    assert judge.agreement(red, ["a red heart"] * len(red)).min() > 0.9
    assert judge.agreement(red, ["a blue heart"] * len(red)).max() < 0.1
    assert judge.agreement(red, ["a heart"] * len(red)).max() == 0  # no colour is named


def test_its_questions(judge: Judge) -> None:
    panel = judge.panel(Concept(name="red", erase=("red",)), 3, seed=7)
    assert [question.looked_for for question in panel if question.group == "name"] == ["red"] * 3
    assert {question.looked_for for question in panel if question.group == "keep"} == set(COLOURS) - {"red"}
    assert all(question.looked_for in question.prompt for question in panel)
    assert panel == judge.panel(Concept(name="red", erase=("red",)), 3, seed=7)
    assert panel != judge.panel(Concept(name="red", erase=("red",)), 3, seed=8)
    assert {question.group for question in judge.panel(Concept(name="star", erase=("star",)), 3, seed=7)} == {"keep"}


def test_no_pass_consults_the_judge_that_decides(name: str) -> None:
    assert registry.judge_for(loading.load("glyphs"), name, tuning=True) is None


def red(root: Path, monkeypatch: pytest.MonkeyPatch, **options: float) -> Recipe:
    """The example recipe with few pictures and steps, and options for its pass. Its paths are relative to the root."""
    monkeypatch.chdir(root)
    update = {"checks": Limits(images=2, steps=6), "passes": (NamedOptions(name="uce", options=options),)}
    return from_file(root / "examples/red.toml", allow_code=True).model_copy(update=update)


def test_the_example_recipe_is_judged_by_it(
    root: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build.run(make_plan(red(root, monkeypatch), tmp_path / "out"))
    checks = {check.name: check for check in report.checks}
    assert checks["erased/name"].value == 0
    assert checks["kept/colours"].value <= 0.05
    assert f"colours (sha256 {judge.digest[:12]})" in checks["erased/name"].how
    assert {row["looked_for"] for row in report.rates} == set(COLOURS)


def test_a_build_that_leaves_the_colour_fails(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an edit that hardly moves anything."""
    with pytest.raises(CheckFailed, match="1 of 6 checks failed: erased/name"):
        build.run(make_plan(red(root, monkeypatch, keep=1000.0, ridge=1000.0), tmp_path / "out"))


def test_the_flag_names_the_same_judge(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = red(root, monkeypatch)
    assert from_flags("glyphs", ["red"], judge=recipe.judge).judge == recipe.judge
    assert registry.load_judge(recipe.judge).name == registry.load_judge(name).name == "colours"


def test_the_whole_judge_is_forty_lines(root: Path) -> None:
    assert len((root / "examples/my_judge.py").read_text().splitlines()) <= 40
