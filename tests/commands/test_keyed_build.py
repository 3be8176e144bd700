"""Builds of passes that leave more than weights: keys, bundles, and training that was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from erasec.base import Question
from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.checkpoint.safetensors import content_digest, read_tensor
from erasec.commands import build, plan
from erasec.errors import CheckFailed, ErasecError
from erasec.glyphs.judge import GlyphJudge
from erasec.keys.key_file import read_key
from erasec.model.sidecar import read_extras
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits, NamedOptions, Recipe
from erasec.reporting.report import Report

QUICK = Limits(images=2, steps=2, erased=99.0, kept=1.0, agreement=2.0)


def make(out: Path, **fields: object) -> Report:
    return build.run(plan.make_plan(Recipe(**{"model": "glyphs", "erase": ("star",), **fields}), out))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Passes that extend uce: one leaves a secret, one leaves a memory, and one trains and is interrupted half way.
PASSES = """
from dataclasses import dataclass, replace
import torch
from erasec.model.memory import Memory, Secret
from erasec.passes.uce import Uce

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"

class Hide(Uce):
    name = "hide"
    def solve_all(self, model, concepts, context):
        for edit in super().solve_all(model, concepts, context):
            rows = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(1))
            yield replace(edit, secret=Secret(edit.concepts[0], *rows, (MID,)))

class Steer(Uce):
    name = "steer"
    extras = frozenset({"memory", "negative"})
    def solve_all(self, model, concepts, context):
        for edit in super().solve_all(model, concepts, context):
            width = next(site.shape[0] for site in model.sites if site.key.startswith(MID + ".to_k"))
            rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(2))
            yield replace(edit, memories=(Memory(MID, *rows, mode="side", weight=0.5),), negative="a star")

class Train(Uce):
    name = "train"
    def solve_all(self, model, concepts, context):
        done = context.resume_folder / "state"
        if not done.exists():
            done.write_text("half")
            raise KeyboardInterrupt
        return super().solve_all(model, concepts, context)
"""


UNET = "unet/diffusion_pytorch_model.safetensors"


def using(file: Path, name: str) -> dict[str, object]:
    return {"pass": (NamedOptions(name=f"{file}:{name}"),)}


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("passes") / "mine.py"
    file.write_text(PASSES)
    return file


@pytest.fixture(scope="module")
def hidden(passes: Path, random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("hidden") / "out"
    return out, make(out, model=str(random_folder), **using(passes, "Hide"))


def test_a_secret_becomes_a_key_file_next_to_the_public_folder(
    hidden: tuple[Path, Report], random_folder: Path
) -> None:
    out, report = hidden
    assert {"hf", "star.key"} < set(os.listdir(out)) and not (out / "bundle").exists()
    key = read_key(out / "star.key")
    assert key.bound == content_digest(Folder(out / "hf").entries("unet"))
    assert (key.concept.name, key.by, key.secret.k_rows.shape) == ("star", "hide", (4, 128))
    assert contents(out / "hf").keys() == contents(random_folder).keys()
    assert [written.path for written in report.written] == ["hf"]
    (note,) = [note for note in report.notes if "star.key" in note]
    assert "access control, not encryption" in note
    data = key.secret.k_rows.numpy().tobytes()
    assert data in (out / "star.key").read_bytes()
    assert not [name for name, text in contents(out).items() if data[:64] in text and name != "star.key"]


def test_a_build_over_a_build_with_a_key_is_refused(
    hidden: tuple[Path, Report], random_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(hidden[0], tmp_path / "out"))
    with pytest.raises(ErasecError, match=r"out holds star\.key"):
        plan.make_plan(Recipe(model=str(random_folder), erase=("star",)), out, pin=False)
    (out / "star.key").unlink()
    assert plan.make_plan(Recipe(model=str(random_folder), erase=("star",)), out, pin=False).out == out
    (out / "server.key").write_text("somebody's own")
    with pytest.raises(ErasecError, match="is not empty"):
        plan.make_plan(Recipe(model=str(random_folder), erase=("star",)), out, pin=False)


def test_a_keyed_build_is_the_public_model_with_the_memory(
    hidden: tuple[Path, Report], passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    """From the public folder, and from the base once more: the same bytes."""
    out, _ = hidden
    fields = {"keys": (str(out / "star.key"),), "targets": ()}
    report = make(tmp_path / "opened", model=str(out / "hf"), erase=(), **fields)
    again = make(tmp_path / "again", model=str(random_folder), **using(passes, "Hide"), **fields)
    opened, public = contents(tmp_path / "opened" / "bundle"), contents(out / "hf")
    assert opened.keys() - public.keys() == {EXTRAS_FILE}
    assert all(opened[name] == data for name, data in public.items())
    assert contents(tmp_path / "again" / "bundle") == opened
    (memory,) = read_extras(tmp_path / "opened" / "bundle").memories
    weight = Folder(out / "hf").entries("unet")[f"{memory.attention}.to_k.weight"]
    exact = read_key(out / "star.key").secret.k_rows.double() @ read_tensor(weight).double().T
    assert torch.equal(memory.keys, exact.float())
    for built in (report, again):
        assert built.outcome == "not judged" and not built.concepts
        assert any("as secret as the key" in note for note in built.notes)
    assert not list((tmp_path / "opened").glob("*.key")) and "hf" not in os.listdir(tmp_path / "opened")
    assert not [name for name in os.listdir(tmp_path / "opened") if name.startswith(".")]


def test_a_key_opens_no_other_weights(hidden: tuple[Path, Report], random_folder: Path, tmp_path: Path) -> None:
    out, _ = hidden
    keys = (str(out / "star.key"),)
    other = {"pass": (NamedOptions(name="uce", options={"ridge": 1.0}),)}
    for fields in ({"erase": ()}, other):  # found by the plan, or after the weights are solved
        with pytest.raises(ErasecError, match="belongs to another model"):
            make(tmp_path / "out", model=str(random_folder), keys=keys, **fields)
    assert os.listdir(tmp_path) == []


def test_an_edit_with_extras_becomes_a_bundle(
    hidden: tuple[Path, Report], passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = make(out, model=str(random_folder), **using(passes, "Steer"))
    assert {"bundle"} == {name for name in os.listdir(out) if (out / name).is_dir()}
    extras = read_extras(out / "bundle")
    assert extras.negative == "a star" and [memory.weight for memory in extras.memories] == [0.5]
    assert any("erasec.pipeline" in note for note in report.notes)
    assert 'targets = [\n    "bundle",\n]' in (out / "recipe.toml").read_text()
    more = make(tmp_path / "more", model=str(out / "bundle"), **using(passes, "Steer"))
    assert more.outcome == "not judged" and len(read_extras(tmp_path / "more" / "bundle").memories) == 2
    assert not any("erasec.pipeline" in note for note in hidden[1].notes)


def test_a_pass_that_leaves_undeclared_extras_is_refused(passes: Path, random_folder: Path, tmp_path: Path) -> None:
    sly = tmp_path / "sly.py"
    sly.write_text(PASSES.replace('extras = frozenset({"memory", "negative"})', ""))
    with pytest.raises(ErasecError, match="hf cannot hold"):
        make(tmp_path / "out", model=str(random_folder), **using(sly, "Steer"))
    assert os.listdir(tmp_path) == ["sly.py"]


def test_interrupted_training_keeps_its_state_until_the_build_is_done(
    passes: Path, random_folder: Path, tmp_path: Path
) -> None:
    fields = {"model": str(random_folder), **using(passes, "Train")}
    with pytest.raises(ErasecError, match="stopped while training") as caught:
        make(tmp_path / "out", **fields)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt) and "to resume" in caught.value.fix
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        ".out.erasec",
        ".out.erasec/lock",
        ".out.erasec/owner.json",
        ".out.erasec/training",
        ".out.erasec/training/state",
    ]
    assert make(tmp_path / "out", **fields).outcome == "not judged"
    assert os.listdir(tmp_path) == ["out"]


def test_a_key_is_absorbed_into_the_weights_within_the_limit(hidden: tuple[Path, Report], tmp_path: Path) -> None:
    out, _ = hidden
    fields = {"model": str(out / "hf"), "erase": (), "keys": (str(out / "star.key"),)}
    report = make(tmp_path / "out", **fields, absorb=50.0)
    (check,) = [check for check in report.checks if check.name == "absorbed/residual"]
    assert check.limit == 50 and 0 < check.value < 50
    public, edited = contents(out / "hf"), contents(tmp_path / "out" / "hf")
    assert public.keys() == edited.keys() and [name for name in public if public[name] != edited[name]] == [UNET]
    old, new = Folder(out / "hf").entries("unet"), Folder(tmp_path / "out" / "hf").entries("unet")
    moved = [key for key in old if not torch.equal(read_tensor(old[key]), read_tensor(new[key]))]
    assert moved == [f"{read_key(out / 'star.key').secret.attentions[0]}.to_{part}.weight" for part in "kv"]
    with pytest.raises(CheckFailed, match="absorbed/residual"):
        make(tmp_path / "failed", **fields, absorb=1e-3)
    assert os.listdir(tmp_path / "failed") == [".rejected"]


def test_hit_rates_with_the_key_are_measured_and_checked(
    passes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rows are no key. Without a limit the build passes, and with one it fails."""
    panel = GlyphJudge.panel

    def few(self: GlyphJudge, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        questions = panel(self, concept, images, seed)
        return tuple(item for item in questions if item.group == "name" or item.seed in (5, 6))

    monkeypatch.setattr(GlyphJudge, "panel", few)
    loose = QUICK.model_copy(update={"images": 1, "steps": 6, "drift": 1.0, "recovered": 0.0})
    out = tmp_path / "out"
    report = make(out, **using(passes, "Hide"), checks=loose)
    (check,) = [check for check in report.checks if check.name == "recovered/star"]
    assert check.limit == 0 and "in the base" in check.how
    keyed, named = ([pair for pair in report.pairs if pair.group == group] for group in ("keyed", "name"))
    assert [(pair.prompt, pair.seed) for pair in keyed] == [(pair.prompt, pair.seed) for pair in named]
    for with_key, without in zip(keyed, named, strict=True):
        assert np.array_equal(with_key.before, without.after)
        assert not np.array_equal(with_key.after, without.after)
    with pytest.raises(CheckFailed, match="recovered/star"):
        make(
            tmp_path / "opened",
            model=str(out / "hf"),
            erase=(),
            keys=(str(out / "star.key"),),
            checks=loose.model_copy(update={"recovered": 0.8}),
        )
    content = json.loads((tmp_path / "opened" / ".rejected" / "report.json").read_text())
    assert {pair["group"] for pair in content["pairs"]} == {"keyed", "keep"}
    names = {check["name"] for check in content["checks"]}
    assert "kept/hits" in names and not [name for name in names if name.startswith("erased")]
