"""Releases: what can undo an erasure lies apart unless the recipe lets it in; and what describes every build."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from signed import key_pair, needs_signing
from typer.testing import CliRunner

from erasec.checkpoint import manifest, signature
from erasec.cli.app import app
from erasec.commands import build, plan
from erasec.commands.check import examine
from erasec.commands.verify import verify
from erasec.errors import TOOL_MISSING, CheckFailed, ErasecError
from erasec.keys.key_file import read_key
from erasec.recipe.recipe import Limits, NamedOptions, Publish, Recipe, from_flags, from_toml, to_toml
from erasec.reporting.bom import BOM
from erasec.reporting.provenance import EPOCH, PROVENANCE
from erasec.reporting.report import Report

QUIET = Limits(pictures=0)
HIDE = """
from dataclasses import replace
import torch
from erasec.model.memory import Secret
from erasec.passes.uce import Uce

class Hide(Uce):
    name = "hide"
    def solve_all(self, model, concepts, context):
        for edit in super().solve_all(model, concepts, context):
            rows = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(1))
            attention = "mid_block.attentions.0.transformer_blocks.0.attn2"
            yield replace(edit, secret=Secret(edit.concepts[0], *rows, (attention,)))
"""


def planned(model: Path, out: Path, sign: Path | None = None, **fields: Any) -> plan.Plan:
    recipe = Recipe(**{"model": str(model), "erase": ("church",), "checks": QUIET, "device": "cpu", **fields})
    return plan.make_plan(recipe, out, sign=sign)


@pytest.fixture
def hide(tmp_path: Path) -> tuple[NamedOptions, ...]:
    (tmp_path / "hide.py").write_text(HIDE)
    return (NamedOptions(name=f"{tmp_path / 'hide.py'}:Hide"),)


def undoing(report: Report) -> list[tuple[str, bool]]:
    return [(item["path"], item["inside"]) for item in report.undoing]


def test_a_release_holds_no_edit_and_no_key(random_folder: Path, hide: Any, tmp_path: Path) -> None:
    out, private = tmp_path / "out", tmp_path / "out.private"
    report = build.run(planned(random_folder, out, targets=("edit",), publish=Publish(), **{"pass": hide}))
    assert sorted(os.listdir(private)) == ["church.key", "edit", manifest.FILE]
    assert private.stat().st_mode & 0o777 == 0o700
    assert not list(out.rglob("*.key")) and not list(out.rglob("*.edit.safetensors"))
    assert undoing(report) == [("edit", False), ("church.key", False)]
    assert sum("It is not in this folder, but in out.private" in note for note in report.notes) == 2
    assert [item.path for item in report.written] == ["hf"]
    assert not [check for check in examine(private).checks + examine(out).checks if not check.passed]
    assert read_key(private / "church.key").concept.name == "church"
    with pytest.raises(ErasecError, match=r"holds church.key"):  # no other key opens this model
        planned(random_folder, out, publish=Publish())
    keys = (str(private / "church.key"),)
    with pytest.raises(ErasecError, match="a release cannot contain a key"):
        planned(out / "hf", tmp_path / "opened", erase=(), keys=keys, publish=Publish())


def test_the_recipe_lets_them_in(random_folder: Path, hide: Any, tmp_path: Path) -> None:
    publish = Publish(edits=True, keys=True)
    report = build.run(planned(random_folder, tmp_path / "out", targets=("edit",), publish=publish, **{"pass": hide}))
    assert undoing(report) == [("edit", True), ("church.key", True)]
    assert {"hf", "edit", "church.key"} <= set(os.listdir(tmp_path / "out"))
    assert not (tmp_path / "out.private").exists()
    assert any(note.startswith("edit can undo the erasure") for note in report.notes)
    (tmp_path / "out" / "church.key").unlink()  # the release is handed out without it
    found = verify(tmp_path / "out")
    assert found.wrong == "" and "church.key was taken away" in found.findings[0].how
    assert not any("church.key" in note for note in found.notes)


@needs_signing
def test_a_rejected_release_is_kept_together_and_not_signed(random_folder: Path, tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path)
    gate = Limits(pictures=0, require_judge=True)
    with pytest.raises(CheckFailed):
        build.run(planned(random_folder, tmp_path / "out", private, targets=("edit",), checks=gate, publish=Publish()))
    rejected = tmp_path / "out.private" / manifest.REJECTED
    assert (rejected / "edit").is_dir() and not (rejected / manifest.SIGNATURE).exists()
    assert os.listdir(rejected.parent) == [manifest.REJECTED] and rejected.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "key.pub", "out.private"]


def test_a_rejected_release_leaves_the_published_one_as_it_is(random_folder: Path, tmp_path: Path) -> None:
    out, private = tmp_path / "out", tmp_path / "out.private"
    rejected, gate = private / manifest.REJECTED, Limits(pictures=0, require_judge=True)

    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    build.run(planned(random_folder, out, targets=("edit",), publish=Publish()))
    public, own = files(out), files(private)
    for _ in range(2):  # the second one takes the place of the first
        with pytest.raises(CheckFailed) as caught:
            build.run(planned(random_folder, out, targets=("edit",), checks=gate, publish=Publish()))
        assert caught.value.where == str(rejected) and (rejected / "edit").is_dir()
        assert files(out) == public and {name for name in files(private) if not name.startswith(".rejected")} == own
    assert verify(out).wrong == ""
    assert not [check for check in examine(private).checks if not check.passed]
    build.run(planned(random_folder, out, publish=Publish()))  # which keeps nothing apart
    assert not rejected.exists()


def test_a_rejected_build_alone_leaves_no_private_folder_after_a_release(random_folder: Path, tmp_path: Path) -> None:
    out, gate = tmp_path / "out", Limits(pictures=0, require_judge=True)
    with pytest.raises(CheckFailed):
        build.run(planned(random_folder, out, checks=gate, publish=Publish()))
    build.run(planned(random_folder, out, publish=Publish()))
    assert os.listdir(tmp_path) == ["out"]


def test_a_release_through_a_link_lies_beside_what_the_link_points_to(random_folder: Path, tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    (big / "release").mkdir(parents=True)
    small.mkdir()
    (small / "out").symlink_to(big / "release")
    build.run(planned(random_folder, small / "out", targets=("edit",), publish=Publish()))
    assert (small / "out").is_symlink() and (big / "release" / "hf").is_dir()
    assert (big / "release.private" / "edit").is_dir() and os.listdir(small) == ["out"]


def test_what_describes_a_build_fits_its_formats(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EPOCH, "86400")
    out = tmp_path / "out"
    report = build.run(planned(random_folder, out, targets=("edit",)))
    statement = json.loads((out / PROVENANCE).read_text())
    run = statement["predicate"]["runDetails"]
    assert run["metadata"] == {"startedOn": "1970-01-02T00:00:00Z", "finishedOn": "1970-01-02T00:00:00Z"}
    assert {item["name"] for item in statement["subject"]} == {*manifest.contents(out)} - {PROVENANCE}
    (dependency,) = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert dependency["digest"] == {"sha256": report.model["digest"]}
    assert [item["digest"]["sha256"] for item in run["byproducts"]] == [edit.digest for edit in report.applied]
    assert run["erasec_undoing"] == [dict(item) for item in report.undoing] and undoing(report) == [("edit", True)]
    schema = pytest.importorskip("cyclonedx.schema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    if importlib.util.find_spec("jsonschema"):
        validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
        text = (out / BOM).read_text()
        assert validator.validate_str(text) is None
        assert validator.validate_str(text.replace('"machine-learning-model"', '"model"')) is not None
    assert "timestamp" not in json.loads((out / BOM).read_text())["metadata"]
    if importlib.util.find_spec("in_toto_attestation"):
        from google.protobuf import json_format
        from in_toto_attestation.v1 import statement as in_toto
        from in_toto_attestation.v1 import statement_pb2

        message: Any = statement_pb2.Statement()  # type: ignore[attr-defined]
        json_format.ParseDict(statement, message)
        wrapped: Any = in_toto.Statement.copy_from_pb(message)
        wrapped.validate()


def test_a_time_that_is_none_is_an_error_of_the_plan(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EPOCH, "yesterday")
    with pytest.raises(ErasecError, match="SOURCE_DATE_EPOCH is 'yesterday'"):
        planned(random_folder, tmp_path / "out")


def test_a_plan_checks_the_key_that_signs(random_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["plan", str(random_folder), "--erase", "church", "--out", "out", "--sign", "none.pem"]
    if all(importlib.util.find_spec(name) for name in signature.MODULES):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and "there is no file none.pem" in result.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == TOOL_MISSING and 'pip install "erasec[sign]"' in result.stderr


def test_the_table_is_written_and_read(tmp_path: Path) -> None:
    recipe = from_flags("glyphs", ["star"], publish=True)
    assert recipe.publish == Publish() and from_toml(to_toml(recipe)) == recipe
    assert "publish" not in to_toml(from_flags("glyphs", ["star"]))
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe).replace("edits = false", "edits = true"))
    assert from_flags(str(file), publish=True).publish == Publish(edits=True)
    file.write_text(to_toml(recipe).replace("edits = false", "edit = true"))
    with pytest.raises(ErasecError, match="there is no key 'edit'") as caught:
        from_flags(str(file))
    assert "edits" in caught.value.why
