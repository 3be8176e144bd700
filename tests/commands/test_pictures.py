"""The three states of a build, and pictures of models that no judge knows, in whole builds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import torch
from typer.testing import CliRunner, Result

from erasec.attention.pipeline import Sampling, generate
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.cli.app import app
from erasec.commands import build, pictures, plan
from erasec.commands.check import examine
from erasec.errors import CheckFailed
from erasec.recipe import concept
from erasec.recipe.recipe import Limits, Recipe
from erasec.reporting.report import Report

QUICK = Limits(images=1, steps=1, erased=99.0, kept=2.0, agreement=2.0, drift=1.0, pictures=1)
JUDGED = QUICK.model_copy(update={"images": 2, "steps": 8})  # fewer, and the judge sees no star before the edit


def make(out: Path, **fields: Any) -> Report:
    recipe = Recipe(**{"model": "glyphs", "erase": ("star",), "checks": QUICK, "device": "cpu", **fields})
    return build.run(plan.make_plan(recipe, out))


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def states(out: Path) -> tuple[str, bool, str, str]:
    """What report.json, report.html and the model card in ``out`` say: outcome and passed, pill, first words."""
    facts = json.loads((out / "report.json").read_text())
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    pill = page.split('class="pill ')[1].split(">")[1].split("<")[0].strip()
    return facts["outcome"], facts["passed"], pill, card.split("**")[1]


@pytest.mark.parametrize("words", [(), ("--gate",)], ids=["plain", "gate"])
def test_everything_says_that_a_build_was_not_judged(random_folder: Path, tmp_path: Path, words: Any) -> None:
    """stdout, exit code, report.json, report.html and the card; with --gate the build is rejected instead."""
    out = tmp_path / "out"
    done = run("build", random_folder, "--erase", "church", "--pictures", "1:steps=1", "--out", out, *words)
    if not words:
        assert (done.exit_code, states(out)) == (0, ("not judged", False, "? not judged", "Not judged"))
        assert done.stdout.splitlines()[2].startswith("not judged: no judge can see church")
        assert "passed" not in done.stdout
        page = (out / "report.html").read_text()
        assert 'class="pill passed"' not in page and '<h1 class="unjudged">' in page
        examination = examine(out)
        assert all(check.passed for check in examination.checks)
        assert "was not judged: no judge could see church" in examination.notes[0]
        assert "require_judge" not in (out / "recipe.toml").read_text()
        return
    assert (done.exit_code, done.stdout, os.listdir(out)) == (3, "", [".rejected"])
    rejected = out / ".rejected"
    assert states(rejected) == ("rejected", False, "✕ rejected", "Rejected")
    assert "error: 1 of 4 checks failed: judged" in done.stderr and "no judge can see church" in done.stderr
    assert "--judge" in done.stderr and (rejected / "hf").is_dir()
    assert "require_judge = true" in (rejected / "recipe.toml").read_text()


def test_a_gate_lets_a_judged_build_through_and_none_with_an_unseen_concept(tmp_path: Path) -> None:
    """Of two concepts one is unseen: the build is not judged, names it, and shows pictures of both."""
    gated = JUDGED.model_copy(update={"require_judge": True})
    report = make(tmp_path / "star", checks=gated)
    assert report.outcome == "passed" and "judged" in {check.name for check in report.checks}
    both = make(tmp_path / "both", erase=("star", "golf-ball"), checks=JUDGED)
    assert (both.outcome, both.unjudged, both.judged) == ("not judged", ("golf-ball",), ("star",))
    assert states(tmp_path / "both")[0] == "not judged"
    named = {(pair.concept, bool(pair.looked_for)) for pair in both.pairs if pair.group == "name"}
    assert named == {("star", True), ("golf-ball", False)}
    page = (tmp_path / "both" / "report.html").read_text()
    assert "By name: star" in page and "By name: golf-ball" in page and "No judge could see golf-ball" in page
    with pytest.raises(CheckFailed, match="judged") as caught:
        make(tmp_path / "gated", erase=("star", "golf-ball"), checks=gated)
    assert "no judge can see golf-ball (" in caught.value.why and "star and golf-ball" in caught.value.why


def test_pictures_of_every_group_are_in_the_report(random_folder: Path, tmp_path: Path) -> None:
    report = make(tmp_path / "out", model=str(random_folder), erase=("church",))
    assert [pair.group for pair in report.pairs] == ["name", "synonym", "implicit", "keep"]
    assert {pair.concept for pair in report.pairs} == {"church"} and report.rates == ()
    assert any((pair.before != pair.after).any() for pair in report.pairs)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("not\u00a0judged</small>") == 4 and "●" not in page and "1 for each group of prompts" in page
    none = make(tmp_path / "none", model=str(random_folder), checks=QUICK.model_copy(update={"pictures": 0}))
    assert (none.pairs, none.outcome) == ((), "not judged")


def test_a_painted_build_of_a_list_of_names_has_pictures_of_each_and_lists_few_in_a_line(
    random_folder: Path, tmp_path: Path
) -> None:
    names = [f"Person {letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    out = tmp_path / "out"
    flags = ("--pictures", "1:steps=1", "--pass", "uce:rows=last", "--out", out)
    done = run("build", random_folder, "--erase", tmp_path / "names.txt", *flags)
    assert (done.exit_code, states(out)[0]) == (0, "not judged")
    facts, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert [pair["concept"] for pair in facts["pairs"] if pair["group"] == "name"] == names == facts["unjudged"]
    assert page.count("<details><summary>Person ") == 20
    assert page.count("<h3>By name: Person ") == 16 and "Pictures of 4 more concepts are not shown" in page
    assert "whether Person A, Person B, Person C and 17 more are gone was not measured" in facts["verdict"]
    listed = [*facts["notes"], *done.stdout.splitlines(), *done.stderr.splitlines()]
    assert any("no concept files are named 'Person A', 'Person B', 'Person C' and 17 more" in line for line in listed)
    assert max(sum(line.count(name) for name in names) for line in listed) == 8


def test_a_build_says_how_a_check_failed(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="1 of") as caught:
        make(tmp_path / "out", checks=JUDGED.model_copy(update={"drift": 0.0}))
    assert "kept/drift is" in caught.value.why and "mean absolute change of a pixel" in caught.value.why


def altered(folder: Path, out: Path, component: str, change: Any) -> Path:
    """A copy of a folder in which ``change`` is made to each tensor of a component."""
    shutil.copytree(folder, out)
    (file,) = (out / component).glob("*.safetensors")
    entries, metadata = read_header(file)
    save_tensors(file, {key: change(key, read_tensor(entry)) for key, entry in entries.items()}, metadata)
    return out


@pytest.mark.parametrize(
    ("component", "value", "why"), [("vae", 0.0, "pictures of a single colour"), ("unet", float("nan"), "has a NaN")]
)
def test_a_model_that_paints_nothing_is_rejected(
    random_folder: Path, tmp_path: Path, component: str, value: float, why: str
) -> None:
    """A VAE of zeros paints one colour, which no other check notices; a UNet with NaN paints black."""

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(value) if component == "vae" or key == "conv_in.weight" else tensor

    base = altered(random_folder, tmp_path / "base", component, change)
    with pytest.raises(CheckFailed, match="pictures/finite") as caught:
        make(tmp_path / "out", model=str(base), erase=("church",))
    assert why in caught.value.why


def test_a_failure_to_paint_is_a_note_and_not_hidden(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("image_embeds")

    monkeypatch.setattr("erasec.judging.evidence.paint_pairs", fails)
    report = make(tmp_path / "out", model=str(random_folder), erase=("church",))
    assert report.outcome == "not judged" and report.pairs == ()
    assert "No pictures could be painted: 'image_embeds' is missing or not known." in report.notes
    with pytest.raises(KeyError):  # of a judged build it is an error
        make(tmp_path / "judged")


def test_the_pictures_of_a_single_file_are_those_of_its_folder(tmp_path: Path) -> None:
    random_models.random_folder(tmp_path / "sd1", "sd1")
    small = QUICK.model_copy(update={"picture_size": 64})
    fields: dict[str, Any] = {"erase": ("church",), "checks": small}
    first = make(tmp_path / "out", model=str(tmp_path / "sd1"), targets=("ldm",), **fields)
    file = tmp_path / "out" / "ldm" / "model.safetensors"
    again = make(tmp_path / "again", model=str(file), **{**fields, "erase": ("golf-ball",)})
    prompts, seeds = [pair.prompt for pair in again.pairs], [pair.seed for pair in again.pairs]
    wanted = generate(tmp_path / "out" / "hf", prompts, seeds, Sampling(1, QUICK.guidance, side=64), "")
    assert len(first.pairs) == len(again.pairs) == 4 and wanted.shape == (4, 64, 64, 3)
    for pair, picture in zip(again.pairs, wanted.astype(int), strict=True):
        assert np.abs(pair.before - picture).max() <= 2
    assert np.abs(again.pairs[0].before - wanted[1].astype(int)).max() > 20  # negative control: another picture
    assert not [name for name in os.listdir(tmp_path / "again") if name.startswith(".")]


def test_a_plan_says_what_will_be_painted_and_how_the_build_will_end(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("plan", random_folder, "--erase", "church", "--device", "cpu")
    text, described = run(*words), json.loads(run(*words, "--json").stdout)
    assert " paint  2 for each group of prompts, 4 steps" in text.stdout and "at most 10 minutes" in text.stdout
    assert described["unjudged"] == ["church"] and described["pictures"]["sampling"]["steps"] == 4
    assert "   end  not judged at best: no judge can see church\n" in text.stdout
    assert "will be rejected, because it requires a judge" in run(*words, "--gate").stdout
    assert "requires a judge" not in text.stdout
    judged = json.loads(run("plan", "glyphs", "--erase", "star", "--gate", "--json").stdout)
    assert "requires a judge" not in str(judged["notes"])
    assert judged["unjudged"] == [] and "that the judge looks at" in judged["pictures"]["how"]
    wrong = run(*words, "--pictures", "few")
    assert wrong.exit_code == 2 and "--pictures 1" in wrong.stderr


def test_the_flags_are_keys_of_the_recipe(tmp_path: Path) -> None:
    from erasec.recipe.recipe import from_flags, from_toml, to_toml

    file = tmp_path / "mine.toml"
    file.write_text('model = "glyphs"\nerase = ["star"]\n[checks]\nimages = 5\npictures = 9\n')
    changed = from_flags(str(file), pictures="3:steps=2,size=256,minutes=1.5", gate=True).checks
    assert changed == Limits(
        images=5, pictures=3, picture_steps=2, picture_size=256, picture_minutes=1.5, require_judge=True
    )
    assert from_flags(str(file)).checks == Limits(images=5, pictures=9)
    assert concept.find("star", "glyphs").name == "star"
    assert from_toml(to_toml(from_flags(str(file), gate=True))).checks.require_judge


def test_pictures_of_the_base_are_cached_unless_the_judge_is_that_of_a_small_world(
    random_folder: Path, tmp_path: Path
) -> None:
    def cached(model: str, concept: str) -> bool:
        made = plan.make_plan(Recipe(model=model, erase=(concept,)), tmp_path / "out", pin=False)
        assert (made.judge is None) == (concept == "church")
        return bool(pictures.cache_of(made))

    assert cached(str(random_folder), "church") and cached(str(random_folder), "nudity")
    assert not cached("glyphs", "star")
