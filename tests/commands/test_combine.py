"""Combining edit files: the concepts of several files solved as one edit, from their stored sums."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from glyph_passes import tuned

from erasec.base import Context, Pass
from erasec.checkpoint.staging import output
from erasec.commands.apply import apply
from erasec.commands.combine import combine
from erasec.errors import ErasecError
from erasec.model.edit_file import read_edits, write_edits
from erasec.model.view import Model
from erasec.passes.mace import Mace
from erasec.passes.rece import Rece
from erasec.passes.speed import Speed
from erasec.passes.trce import Remap
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="triangle", keep=("square", "box"))
RING = Concept(name="ring", erase=("ring",), anchor="box", keep=("arrow",))


@pytest.fixture(scope="module")
def star(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(base, Uce(), [STAR], tmp_path_factory.mktemp("edits") / "star.edit.safetensors")


def write(model: Model, step: Pass, concepts: list[Concept], path: Path) -> Path:
    """The edit file of ``step`` on the concepts."""
    for edit in step.solve_all(model, concepts, Context()):
        model = model.with_edit(edit)
    write_edits(path, model.edits, model.base_record())
    return path


@pytest.mark.parametrize(
    "step",
    [
        Uce(),
        Uce(rows="last"),
        Remap(),
        tuned(Rece),
        Mace(),
        Speed(),
    ],
    ids=lambda step: f"{step}"[:24],
)
def test_adding_and_removing_concepts_gives_the_joint_edit_bit_by_bit(step: Pass, base: Model, tmp_path: Path) -> None:
    files = {c.name: write(base, step, [c], tmp_path / f"{c.name}.edit.safetensors") for c in (STAR, HEART, RING)}
    joint = read_edits(write(base, step, [STAR, HEART], tmp_path / "joint.edit.safetensors"))[0][0]
    two = combine([files["heart"], files["star"]], [], tmp_path / "two.edit.safetensors")
    all_three = combine([files["ring"], files["star"], files["heart"]], [], tmp_path / "three.edit.safetensors")
    back = combine([tmp_path / "three.edit.safetensors"], ["ring"], tmp_path / "back.edit.safetensors")
    alone = read_edits(files["star"])[0][0]
    for site in joint.deltas:
        weight = base.stored_weight(site)
        assert torch.equal(two.deltas[site].change(weight), joint.deltas[site].change(weight))
        assert torch.equal(back.deltas[site].change(weight), joint.deltas[site].change(weight))
        assert not torch.allclose(all_three.deltas[site].change(weight), joint.deltas[site].change(weight))
        assert not torch.allclose(alone.deltas[site].change(weight), joint.deltas[site].change(weight))
    assert back.concepts == ("heart", "star")
    done = apply(tmp_path / "back.edit.safetensors", str(base.source.root), tmp_path / "out")
    assert done.tensors == len(joint.deltas) > 0


def test_what_cannot_be_combined_says_why(base: Model, star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.edit.safetensors"
    heart = write(base, Uce(), [HEART], tmp_path / "heart")
    disputed = write(
        base, Uce(), [HEART.model_copy(update={"name": "other", "keep": ("star",)})], tmp_path / "disputed"
    )
    becomes = write(base, Uce(), [RING.model_copy(update={"anchor": "a red Star"})], tmp_path / "becomes")
    stronger = write(base, Uce(scale=2.0), [HEART], tmp_path / "stronger")
    remap = write(base, Remap(), [HEART], tmp_path / "remap")
    bare = tmp_path / "bare"
    write_edits(bare, *read_edits(heart), sums=False)
    tries: list[tuple[list[Path], list[str], str]] = [
        ([star, star], [], "in two of the files"),
        ([star, disputed], [], "keeps 'star'"),
        ([star, becomes], [], "ring becomes 'a red Star', which another"),
        ([star, stronger], [], "differ in their options"),
        ([star, remap], [], "differ in their pass"),
        ([star, bare], [], "cannot be combined"),
        ([star, heart], ["moon"], "no file holds 'moon'"),
        ([star], ["star"], "nothing is left"),
    ]
    for files, without, words in tries:
        with pytest.raises(ErasecError, match=words):
            combine(files, without, out)
        assert not out.exists()
    with pytest.raises(ErasecError, match="exists"):
        combine([star, heart], [], star)


def test_an_option_that_the_pass_no_longer_has_is_an_error(star: Path, base: Model, tmp_path: Path) -> None:
    (edit,), about = read_edits(star)
    old = tmp_path / "old.edit.safetensors"
    write_edits(old, [replace(edit, params={**edit.params, "lamb": 0.1})], about)
    with pytest.raises(ErasecError, match="uce has no option 'lamb'"):
        combine([old], [], tmp_path / "out.edit.safetensors")
    assert combine([star], [], tmp_path / "out.edit.safetensors").concepts == ("star",)


def test_the_output_is_written_whole_by_one_command(star: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.edit.safetensors"
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ErasecError, match="is a link to nowhere"):
        combine([star], [], tmp_path / "link")
    with output(out), pytest.raises(ErasecError, match="another command is writing there"):
        combine([star], [], out)
    combine([star], [], out)
    assert sorted(os.listdir(tmp_path)) == ["all.edit.safetensors", "link"]


def test_an_edit_file_that_names_code_runs_none(star: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    (edit,), about = read_edits(star)
    for by in (f"{tmp_path / 'evil.py'}:X", "esd", "nothing"):
        write_edits(tmp_path / "evil", [replace(edit, by=by)], about)
        with pytest.raises(ErasecError, match="evil cannot be combined"):
            combine([tmp_path / "evil"], [], tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_sums_that_do_not_fit_together_are_an_error(star: Path, tmp_path: Path) -> None:
    (edit,), about = read_edits(star)
    for change in ({"context.source": torch.ones(2, 3)}, {"context.lost": torch.ones(3)}):
        write_edits(tmp_path / "cut", [replace(edit, sums={"": {}, "star": {**edit.sums["star"], **change}})], about)
        with pytest.raises(ErasecError, match="do not fit together"):
            combine([tmp_path / "cut"], [], tmp_path / "out")
