"""The prompt and caption files of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from erasec.base import Judge
from erasec.cli.app import app
from erasec.commands.question_files import read_files, remarks
from erasec.errors import ErasecError, MissingTool
from erasec.glyphs.judge import GlyphJudge
from erasec.recipe.recipe import Limits, Recipe, from_flags, from_toml, to_toml


class Everyday(GlyphJudge):
    everyday = True


@pytest.fixture
def night(tmp_path: Path) -> Path:
    path = tmp_path / "night.csv"
    path.write_text("prompt,category\nthe night sky,sky\na clear night,sky\ngold on navy,colours\n")
    return path


def recipe(**fields: object) -> Recipe:
    return Recipe(model="glyphs", **fields)  # type: ignore[arg-type]


def test_files_are_read_sampled_and_described(night: Path) -> None:
    files = read_files(recipe(prompts=(str(night),), captions=str(night), prompt_limit=2, seed=1), None, "cpu")
    assert files.described() == [
        {"name": "night", "holds": "prompts", "total": 3, "used": 2},
        {"name": "night.csv", "holds": "captions", "total": 3, "used": 2},
    ]
    assert files.pictures == 8
    first, second = remarks(files, 1)
    assert first.startswith("night: 2 of 3 prompts are used, chosen at random by the seed 1; --prompt-limit")
    assert second.startswith("night.csv: 2 of 3 captions")
    whole = read_files(recipe(prompts=(str(night),)), None, "cpu")
    assert [*remarks(whole, 1)] == [] and whole.captions is None


@pytest.mark.parametrize(
    ("captions", "judge", "device", "name"),
    [
        ("", Everyday(), "cuda", "captions.csv"),
        ("", Everyday(), "cpu", None),  # 400 pictures would take hours
        ("", GlyphJudge(), "cuda", None),  # its world knows no dogs
        ("", None, "cuda", None),
        ("default", None, "cpu", "captions.csv"),
        ("none", Everyday(), "cuda", None),
    ],
)
def test_the_captions_of_erasec_are_used_where_they_mean_something(
    captions: str, judge: Judge | None, device: str, name: str | None
) -> None:
    file = read_files(recipe(captions=captions), judge, device).captions
    assert (file and file.name) == name


def test_files_that_make_no_sense_are_errors(night: Path, tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no use for prompt files"):
        read_files(recipe(prompts=(str(night),), keys=("a.key",)), None, "cpu")
    (tmp_path / "more").mkdir()
    again = tmp_path / "more" / "night.csv"
    again.write_text(night.read_text())
    with pytest.raises(ErasecError, match="two prompt files are called night"):
        read_files(recipe(prompts=(str(night), str(again))), None, "cpu")
    with pytest.raises(ErasecError, match="there is no such file"):
        read_files(recipe(captions=str(tmp_path / "none.csv")), None, "cpu")
    with pytest.raises(MissingTool, match="the limit lpips cannot be checked") as caught:
        read_files(recipe(checks=Limits(lpips=0.1)), None, "cpu")
    assert 'pip install "erasec[lpips]"' in caught.value.why


@pytest.mark.parametrize("limit", ["cmmd", "kid"])
def test_a_limit_on_a_distance_needs_captions(night: Path, limit: str) -> None:
    checks = Limits(**{limit: 0.5})
    for fields in ({}, {"captions": str(night)}, {"captions": "default", "prompt_limit": 199}):
        with pytest.raises(ErasecError, match=f"the limit {limit} needs at least 200 captions"):
            read_files(recipe(checks=checks, **fields), None, "cpu")
    assert read_files(recipe(checks=checks, captions="default"), None, "cpu").pictures == 400


def test_flags_and_recipes_name_files(night: Path) -> None:
    made = from_flags("glyphs", ["star"], prompts=["a.csv", "b.csv", "a.csv"], captions="c.csv", prompt_limit=7)
    assert (made.prompts, made.captions, made.prompt_limit) == (("a.csv", "b.csv"), "c.csv", 7)
    assert from_toml(to_toml(made)) == made
    plain = to_toml(from_flags("glyphs", ["star"]))
    assert "prompt" not in plain and 'captions = "' not in plain
    done = CliRunner().invoke(app, ["plan", "glyphs", "-e", "star", "--prompts", str(night), "--prompt-limit", "2"])
    assert done.exit_code == 0, done.output
    assert "file  night: 2 of 3 prompts" in done.output
    assert "night: 2 of 3 prompts are used, chosen at random by the seed 0" in done.output
    bad = CliRunner().invoke(app, ["plan", "glyphs", "-e", "star", "--prompts", str(night.parent)])
    assert bad.exit_code == 2
