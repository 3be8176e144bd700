"""``erasec explain``: its numbers are those of the matrices, and it says what it cannot explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from concepts import STAR
from typer.testing import CliRunner

from erasec.base import Context
from erasec.cli.app import app
from erasec.commands.explain import explain
from erasec.errors import ErasecError
from erasec.model.edit import Edit, LowRank
from erasec.model.edit_file import write_edits
from erasec.model.loading import load
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import find


@pytest.fixture(scope="module")
def star() -> tuple[Model, Edit]:
    model = load("glyphs")
    return model, Uce().solve(model, find("star", "glyphs"), Context())


@pytest.fixture
def edit_file(star: tuple[Model, Edit], tmp_path: Path) -> str:
    model, edit = star
    write_edits(tmp_path / "star.edit.safetensors", [edit], model.with_edit(edit).base_record())
    return str(tmp_path / "star.edit.safetensors")


def test_the_erased_phrase_moves_to_its_anchor_and_others_stay(edit_file: str) -> None:
    star, heart, scene = explain(edit_file, ["a red star", "a red heart", "a heart on navy"], base="glyphs")
    assert star.moved > 3 * heart.moved
    assert star.before[0] == ("star", 0.0)
    assert star.after[0][0] == find("star", "glyphs").anchor
    assert heart.before[0][0] == heart.after[0][0] == "heart"
    assert [token for token, _ in star.tokens] == ["a", "red", "star", "(end)"]
    assert dict(star.tokens)["star"] > dict(star.tokens)["a"]
    assert len(scene.after) == 3


def test_the_numbers_are_those_of_the_matrices(star: tuple[Model, Edit], edit_file: str) -> None:
    model, edit = star
    edited = model.with_edit(edit)
    (found,) = explain(edit_file, ["a star"], base="glyphs", against=["a ring"], count=99)
    tokens = model.encode(["a star", "a ring"])
    x, y = (tokens.states[row, tokens.last[row] : tokens.last[row] + 2].double() for row in (0, 1))
    moved, length, gap = 0.0, 0.0, 0.0
    for site in model.streams["context"]:
        before, after = model.weight(site).double(), edited.weight(site).double()
        rows = tokens.states[0, 1 : int(tokens.last[0]) + 2].double()
        moved += float((rows @ (after - before).T).square().sum())
        length += float((rows @ before.T).square().sum())
        gap += float((x @ after.T - y @ before.T).square().sum())
    own = sum(float((x @ model.weight(site).double().T).square().sum()) for site in model.streams["context"])
    assert found.moved == pytest.approx((moved / length) ** 0.5, rel=1e-5)
    # "a star" with "a ring" in the place of "star".
    doubled = dict(explain(edit_file, ["star"], base="glyphs", against=["a ring"], count=99)[0].after)["a ring"]
    x = model.encode(["star"]).states[0, 1:3].double()
    gap = sum(
        float((x @ edited.weight(s).double().T - y @ model.weight(s).double().T).square().sum())
        for s in model.streams["context"]
    )
    own = sum(float((x @ model.weight(s).double().T).square().sum()) for s in model.streams["context"])
    assert doubled == pytest.approx((gap / own) ** 0.5, rel=1e-4)


def test_without_prompts_every_phrase_is_explained(edit_file: str) -> None:
    concept = find("star", "glyphs")
    prompts = [found.prompt for found in explain(edit_file, base="glyphs")]
    assert set(prompts) == {*concept.phrases, *concept.goals, *concept.keep}
    assert prompts[0] == max(concept.phrases, key=len)


def test_an_edited_folder_and_its_base_are_compared(star: tuple[Model, Edit], edit_file: str, tmp_path: Path) -> None:
    model, edit = star
    model.source.write(tmp_path / "out", model.with_edit(edit).merged(), link=True)
    of_file = explain(edit_file, ["a star"], base="glyphs", against=["ring"])
    (of_folder,) = explain(str(tmp_path / "out"), ["a star"], base="glyphs", against=["star", "ring"])
    assert of_folder.moved == pytest.approx(of_file[0].moved, rel=1e-2)  # the folder's weights are float16
    with pytest.raises(ErasecError, match="the base of"):
        explain(str(tmp_path / "out"), ["a star"])


def test_an_edit_that_no_text_reads_is_an_error(base: Model, random_folder: Path, tmp_path: Path) -> None:
    site = base.select("self", ("q",))[0]
    change = LowRank(
        torch.ones(site.shape[0], 1, dtype=torch.float64), torch.ones(1, site.shape[1], dtype=torch.float64)
    )
    edit = Edit({site: change}, "esd", ("star",), base.digest)
    write_edits(tmp_path / "e.safetensors", [edit], base.with_edit(edit).base_record())
    with pytest.raises(ErasecError, match="changes nothing that reads text"):
        explain(str(tmp_path / "e.safetensors"), ["a star"], base=str(random_folder))


def test_an_edit_of_another_model_is_refused(edit_file: str, random_folder: Path) -> None:
    with pytest.raises(ErasecError, match="made for another model"):
        explain(edit_file, ["a star"], base=str(random_folder))
    with pytest.raises(ErasecError, match="there is no model"):
        explain("gone", ["a star"])


def test_the_command_prints_text_and_json(edit_file: str) -> None:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["explain", edit_file, "--base", "glyphs", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "'a star' moves by" in run("--prompt", "a star")
    (facts,) = json.loads(run("--prompt", "a star", "--json"))
    assert set(facts) == {"prompt", "moved", "tokens", "before", "after"}
    assert run().splitlines()[0].split() == ["phrase", "moved", "nearest", "after", "the", "edit"]
    assert STAR.name in run()
