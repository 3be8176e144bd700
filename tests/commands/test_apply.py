"""Edit files on checkpoints: folders, single files, other bases, in place; and edits put together from their sums."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasec.base import Context, Pass
from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import CARRIED, Folder
from erasec.checkpoint.safetensors import file_digest
from erasec.commands import apply as applies
from erasec.errors import CheckFailed, ErasecError
from erasec.glyphs.assemble import random_pipeline
from erasec.ldm.skeleton import random_folder as random_layout
from erasec.model import edit as edits
from erasec.model import sidecar as extras
from erasec.model import view as models
from erasec.model.edit import Dense, Edit, Memory
from erasec.model.view import Model
from erasec.passes.mace import Mace
from erasec.passes.rece import Rece
from erasec.passes.trce import Remap
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.targets.edit_file import EditFile
from erasec.targets.ldm import Ldm

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="ring", keep=("square", "box"))
RING = Concept(name="ring", erase=("ring",), anchor="box", keep=("arrow",))
UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Model:
    return models.load(str(random_folder))


@pytest.fixture(scope="module")
def star(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edits") / "star.edit.safetensors"
    edited = base.with_edit(Uce().solve(base, STAR, Context()))
    edits.write(path, edited.edits, edited.about())
    return path


def write(model: Model, step: Pass, concepts: list[Concept], path: Path) -> Path:
    for edit in step.solve_all(model, concepts, Context()):
        model = model.with_edit(edit)
    edits.write(path, model.edits, model.about())
    return path


def merged(model: Model, file: Path, out: Path) -> Path:
    """What a build writes: the folder of the model with the file's edits."""
    for edit in edits.read(file)[0]:
        model = model.with_edit(edit)
    model.source.write(out, model.merged())
    return out


def test_a_folder_gets_what_a_build_writes(base: Model, star: Path, tmp_path: Path) -> None:
    done = applies.apply(star, str(base.source.root), tmp_path / "out")
    assert (done.tensors, done.notes) == (14, ())
    wanted = merged(base, star, tmp_path / "wanted")
    for name in base.source.files():
        assert (tmp_path / "out" / name).read_bytes() == (wanted / name).read_bytes()
    assert (wanted / UNET).read_bytes() != (base.source.root / UNET).read_bytes()
    assert (wanted / UNET).stat().st_size == (base.source.root / UNET).stat().st_size


def test_in_place_gives_the_same_bytes_and_leaves_no_journal(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    before = file_digest(copy / UNET)
    applies.apply(star, str(copy), in_place=True)
    assert (copy / UNET).read_bytes() == (merged(base, star, tmp_path / "wanted") / UNET).read_bytes()
    assert file_digest(copy / UNET) != before
    assert not journal.pending(copy)
    with pytest.raises(ErasecError, match="another model"):
        applies.apply(star, str(copy), in_place=True)  # a second time is another base


def test_links_are_made_where_asked_and_nowhere_else(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    applies.apply(star, str(copy), tmp_path / "out", link=True)
    vae = Path("vae/diffusion_pytorch_model.safetensors")
    assert os.path.samefile(copy / vae, tmp_path / "out" / vae)
    assert not os.path.samefile(copy / UNET, tmp_path / "out" / UNET)
    with pytest.raises(ErasecError, match="in place") as caught:
        journal.patch_in_place(copy / vae, {"quant_conv.bias": lambda: torch.zeros(8).half()})
    assert "2 names" in caught.value.why


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_stays_one_with_every_other_byte(family: str, tmp_path: Path) -> None:
    random_layout(tmp_path / "base", family, "tiny", dtype="float16")
    Ldm().export(Folder(tmp_path / "base"), tmp_path / "ldm", Context())
    file = tmp_path / "ldm" / "model.safetensors"
    folder, single = models.load(str(tmp_path / "base")), models.load(str(file))
    edit = write(folder, Uce(), [STAR], tmp_path / "star.edit.safetensors")
    done = applies.apply(edit, str(file), tmp_path / "out.safetensors")
    assert done.tensors == len(folder.streams["context"])
    old, new = (checkpoint.read_header(path)[0] for path in (file, tmp_path / "out.safetensors"))
    moved = {key for key in old if not torch.equal(*(checkpoint.read_tensor(each[key]) for each in (old, new)))}
    assert len(moved) == done.tensors
    assert all(".attn2.to_" in key for key in moved)
    view = models.load(str(tmp_path / "out.safetensors"))
    wanted = folder.with_edit(edits.read(edit)[0][0])
    for site in folder.streams["context"]:
        assert torch.equal(view.stored(site), wanted.merge(site))
    assert torch.equal(single.encode(["a star"]).states, folder.encode(["a star"]).states)
    applies.apply(edit, str(file), in_place=True)
    assert file.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_another_base_is_refused_and_with_transfer_told(base: Model, star: Path, tmp_path: Path) -> None:
    random_pipeline(tmp_path / "other", seed=1, dtype=torch.float16)
    with pytest.raises(ErasecError, match="another model") as caught:
        applies.apply(star, str(tmp_path / "other"), tmp_path / "out")
    assert "14 of the 14" in caught.value.why and "--transfer" in caught.value.fix
    assert not (tmp_path / "out").exists()
    done = applies.apply(star, str(tmp_path / "other"), tmp_path / "out", transfer=True)
    assert "not measured" in " ".join(done.notes) and "others here" in done.notes[0]
    site = base.streams["context"][0]
    other = models.load(str(tmp_path / "other"))
    wanted = other.stored(site).double() + edits.read(star)[0][0].deltas[site].change(other.stored(site))
    assert torch.equal(models.load(str(tmp_path / "out")).stored(site), wanted.half())


def test_another_family_is_refused_even_with_transfer(star: Path, tmp_path: Path) -> None:
    random_layout(tmp_path / "sd2", "sd2", "tiny")
    with pytest.raises(ErasecError, match="sd2"):
        applies.apply(star, str(tmp_path / "sd2"), tmp_path / "out", transfer=True)


def test_where_to_must_be_clear_and_free(base: Model, star: Path, tmp_path: Path) -> None:
    root = str(base.source.root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tries: list[tuple[Callable[[], object], str]] = [
        (lambda: applies.apply(star, root), "not clear"),
        (lambda: applies.apply(star, root, tmp_path / "out", in_place=True), "not clear"),
        (lambda: applies.apply(star, root, tmp_path / "full"), "not empty"),
        (lambda: applies.apply(star, root, tmp_path / "a.safetensors"), "a single file"),
        (lambda: applies.apply(star, "glyphs", in_place=True, transfer=True), "not edited in place"),
    ]
    for attempt, words in tries:
        with pytest.raises(ErasecError, match=words):
            attempt()


def test_numbers_that_overflow_stop_everything(base: Model, tmp_path: Path) -> None:
    site = base.streams["context"][0]
    wild = Edit({site: Dense(torch.full(site.shape, 1e6))}, "wild", "star")
    edits.write(tmp_path / "wild.edit.safetensors", [wild], base.with_edit(wild).about())
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    before = file_digest(copy / UNET)
    for out, in_place in ((tmp_path / "out", False), (None, True)):
        with pytest.raises(CheckFailed, match="not finite"):
            applies.apply(tmp_path / "wild.edit.safetensors", str(copy), out, in_place)
    assert file_digest(copy / UNET) == before
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("step", [Uce(), Uce(rows="last"), Remap(), Rece(), Mace()], ids=lambda step: f"{step}"[:24])
def test_concepts_added_and_taken_out_again_are_the_joint_edit_bit_by_bit(
    step: Pass, base: Model, tmp_path: Path
) -> None:
    files = {c.name: write(base, step, [c], tmp_path / f"{c.name}.edit.safetensors") for c in (STAR, HEART, RING)}
    wanted = edits.read(write(base, step, [STAR, HEART], tmp_path / "joint.edit.safetensors"))[0][0]
    one = applies.combine([files["heart"], files["star"]], [], tmp_path / "one.edit.safetensors")
    all_three = applies.combine([files["ring"], files["star"], files["heart"]], [], tmp_path / "three.edit.safetensors")
    back = applies.combine([tmp_path / "three.edit.safetensors"], ["ring"], tmp_path / "back.edit.safetensors")
    alone = edits.read(files["star"])[0][0]
    for site in wanted.deltas:
        weight = base.stored(site)
        assert torch.equal(one.deltas[site].change(weight), wanted.deltas[site].change(weight))
        assert torch.equal(back.deltas[site].change(weight), wanted.deltas[site].change(weight))
        assert not torch.allclose(all_three.deltas[site].change(weight), wanted.deltas[site].change(weight))
        assert not torch.allclose(alone.deltas[site].change(weight), wanted.deltas[site].change(weight))
    assert back.concept == "heart, star"
    done = applies.apply(tmp_path / "back.edit.safetensors", str(base.source.root), tmp_path / "out")
    assert done.tensors == 14


def test_what_cannot_be_combined_says_why(base: Model, star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.edit.safetensors"
    heart = write(base, Uce(), [HEART], tmp_path / "heart")
    disputed = write(
        base, Uce(), [HEART.model_copy(update={"name": "other", "keep": ("star",)})], tmp_path / "disputed"
    )
    stronger = write(base, Uce(scale=2.0), [HEART], tmp_path / "stronger")
    remap = write(base, Remap(), [HEART], tmp_path / "remap")
    bare = tmp_path / "bare"
    edits.write(bare, edits.read(heart)[0], base.about(), sums=False)
    tries: list[tuple[list[Path], list[str], str]] = [
        ([star, star], [], "in two of the files"),
        ([star, disputed], [], "keeps 'star'"),
        ([star, stronger], [], "other options"),
        ([star, remap], [], "differ in their pass"),
        ([star, bare], [], "cannot be combined"),
        ([star, heart], ["moon"], "no file holds 'moon'"),
        ([star], ["star"], "nothing is left"),
    ]
    for files, without, words in tries:
        with pytest.raises(ErasecError, match=words):
            applies.combine(files, without, out)
        assert not out.exists()
    with pytest.raises(ErasecError, match="exists"):
        applies.combine([star, heart], [], star)


@pytest.mark.parametrize(
    ("carried", "words"),
    [
        ({"memories": (Memory("mid_block.x", torch.ones(2, 8), torch.ones(2, 8)),)}, "a memory"),
        ({"tokens": {"<mark>": torch.ones(8)}}, "tokens of its own"),
        ({"negative": "a star"}, "a negative prompt"),
    ],
)
def test_an_edit_that_is_more_than_changes_of_weights_is_refused(
    base: Model, star: Path, tmp_path: Path, carried: dict[str, object], words: str
) -> None:
    (made,), told = edits.read(star)
    more = tmp_path / "more.edit.safetensors"
    edits.write(more, [replace(made, **carried)], told)  # type: ignore[arg-type]
    for refused in (
        lambda: applies.apply(more, base.name, tmp_path / "out"),
        lambda: applies.combine([more], (), tmp_path / "both.edit.safetensors"),
    ):
        with pytest.raises(ErasecError, match=r"more\.edit\.safetensors") as caught:
            refused()
        assert words in caught.value.why and "erasec build" in caught.value.fix
    assert os.listdir(tmp_path) == [more.name]
    assert applies.combine([star], (), tmp_path / "both.edit.safetensors").concept == "star"


def test_what_a_folder_carries_beside_its_weights_stays_with_it(base: Model, star: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(base.source.root, tmp_path / "bundle")
    extras.write(bundle, extras.Extras(negative="a ring"))
    done = applies.apply(star, str(bundle), tmp_path / "out")
    assert extras.read(tmp_path / "out").negative == "a ring" and done.notes == ()
    assert (tmp_path / "out" / CARRIED).read_bytes() == (bundle / CARRIED).read_bytes()


def test_the_target_writes_a_file_that_makes_the_same_checkpoint(base: Model, tmp_path: Path) -> None:
    model = base.with_edit(Uce().solve(base, STAR, Context()))
    artifact = EditFile().export(model, tmp_path, Context())
    assert [(check.name, check.value, check.passed) for check in artifact.checks] == [("edit/again", 0.0, True)]
    file = tmp_path / "star.edit.safetensors"
    assert file.stat().st_size <= 1.1 * EditFile().size(base)
    small = tmp_path / "small"
    EditFile(sums=False).export(model, small, Context())
    assert (small / file.name).stat().st_size < file.stat().st_size
    whole = tmp_path / "whole"
    EditFile(tensors=True).export(model, whole, Context())
    assert EditFile().size(base) < (whole / file.name).stat().st_size <= 1.1 * EditFile(tensors=True).size(base)


def test_the_targets_check_notices_a_file_that_makes_another(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base.with_edit(Uce().solve(base, STAR, Context()))
    other = base.with_edit(Uce().solve(base, HEART, Context()))
    monkeypatch.setattr("erasec.model.edit.read", lambda path: (other.edits, {}))
    check = EditFile().export(model, tmp_path, Context()).checks[0]
    assert (check.value, check.passed) == (14.0, False)


@pytest.mark.parametrize(
    ("lost", "count"),
    [
        ({"memories": ()}, 3.0), ({"tokens": {}}, 2.0), ({"negative": ""}, 1.0), ({"negative": "a ring"}, 1.0),
        ({"tokens": {"<a>": torch.zeros(128)}}, 1.0), ({}, 0.0),
    ],
)  # fmt: skip
def test_the_targets_check_notices_what_is_lost_beside_weights(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: dict[str, object], count: float
) -> None:
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 3, 192), mode="side")
    uce = Uce().solve(base, STAR, Context())
    model = base.with_edit(replace(uce, memories=(memory,), tokens={"<a>": torch.ones(128)}, negative="a star"))
    read = edits.read

    def losing(path: Path) -> tuple[tuple[Edit, ...], dict[str, object]]:
        found, about = read(path)
        return tuple(replace(edit, **lost) for edit in found), about  # type: ignore[arg-type]

    monkeypatch.setattr("erasec.model.edit.read", losing)
    check = EditFile().export(model, tmp_path, Context()).checks[0]
    assert (check.name, check.value, check.passed) == ("edit/again", count, count == 0)
    assert "14 edited tensors and 3 beside them" in check.how


def test_the_targets_check_notices_another_strength_of_a_memory(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", *torch.ones(2, 3, 192), mode="side")
    model = base.with_edit(Edit({}, "hand", "star", memories=(memory,)))
    other = base.with_edit(Edit({}, "hand", "star", memories=(replace(memory, weight=-1.0),)))
    monkeypatch.setattr("erasec.model.edit.read", lambda path: (other.edits, {}))
    assert not EditFile().export(model, tmp_path, Context()).checks[0].passed


def test_unedited_copies_are_named_and_stop_an_edit_in_place(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    copies = ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", f"{UNET.with_suffix('.fp16.safetensors')}")
    for name in copies:
        shutil.copyfile(copy / UNET, copy / name)
    before = file_digest(copy / UNET)
    with pytest.raises(ErasecError, match="not edited in place") as caught:
        applies.apply(star, str(copy), in_place=True)
    assert file_digest(copy / UNET) == before
    (note,) = applies.apply(star, str(copy), tmp_path / "out").notes
    for name in copies:
        assert name in caught.value.why and name in note
        assert not (tmp_path / "out" / name).exists()
        (copy / name).unlink()
    assert applies.apply(star, str(copy), in_place=True).notes == ()


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_are_a_variant_say_how_to_load_them(
    base: Model, star: Path, tmp_path: Path, in_place: bool
) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    (copy / UNET).rename((copy / UNET).with_suffix(".fp16.safetensors"))
    (note,) = applies.apply(star, str(copy), None if in_place else tmp_path / "out", in_place).notes
    assert 'variant="fp16"' in note


def test_nothing_that_is_there_is_replaced(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_layout(tmp_path / "base", "sd1", "tiny", dtype="float16")
    Ldm().export(Folder(tmp_path / "base"), tmp_path / "ldm", Context())
    folder, file = shutil.copytree(base.source.root, tmp_path / "folder"), tmp_path / "ldm" / "model.safetensors"
    edit = write(models.load(str(file)), Uce(), [STAR], tmp_path / "single.edit.safetensors")
    (tmp_path / "some.txt").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tries = [
        (star, folder, tmp_path / "some.txt", "exists"),
        (star, folder, Path(), "working directory"),
        (star, folder, tmp_path, "working directory"),
        (star, folder, folder / "new", "lie in each other"),
        (star, folder, folder.parent / "folder" / "..", "working directory"),
        (star, folder, tmp_path / "new.ckpt", "named as a pickle"),
        (edit, file, edit, "exists"),
        (edit, file, tmp_path / "new.CKPT", "named as a pickle"),
        (edit, file, tmp_path / "new.bin", "named as a pickle"),
        (edit, file, file.parent, "lie in each other"),
        (edit, file, file, "lie in each other"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for each, model, out, words in tries:
        with pytest.raises(ErasecError, match=words):
            applies.apply(each, str(model), out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    for name in ("empty", "model-v1.4"):
        assert applies.apply(edit, str(file), tmp_path / name).notes == ()
        assert (tmp_path / name / "model_index.json").is_file()
    with pytest.raises(ErasecError, match="--link is for folders"):
        applies.apply(edit, str(file), tmp_path / "new.safetensors", link=True)
    with pytest.raises(ErasecError, match="--link is for copies"):
        applies.apply(edit, str(file), in_place=True, link=True)


def test_a_model_of_the_hub_is_not_edited_in_place(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    cached = replace(models.load(str(copy)), revision="0123abcd")
    monkeypatch.setattr(models, "load", lambda *given: cached)
    before = file_digest(copy / UNET)
    with pytest.raises(ErasecError, match="not edited in place") as caught:
        applies.apply(star, "owner/model", in_place=True)
    assert "cache" in caught.value.why
    assert file_digest(copy / UNET) == before
    assert applies.apply(star, "owner/model", tmp_path / "out").tensors == 14


def test_headers_are_not_read_once_for_every_tensor(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint.read_header
    opened: list[Path] = []
    for place in ("safetensors", "folder"):
        monkeypatch.setattr(f"erasec.checkpoint.{place}.read_header", lambda file: (opened.append(file), read(file))[1])
    applies.apply(star, str(base.source.root), tmp_path / "out")
    assert 0 < opened.count(base.source.root / UNET) <= 5


def test_an_option_that_is_no_more_is_told_in_words(star: Path, base: Model, tmp_path: Path) -> None:
    (edit,), told = edits.read(star)
    old = tmp_path / "old.edit.safetensors"
    edits.write(old, [replace(edit, params={**edit.params, "lamb": 0.1})], told)
    with pytest.raises(ErasecError, match="uce has no option 'lamb'"):
        applies.combine([old], [], tmp_path / "out.edit.safetensors")
    assert applies.combine([star], [], tmp_path / "out.edit.safetensors").concept == "star"


@pytest.mark.parametrize("concept", ["AC/DC logo", "../x", "/x", "\u732b" * 80, "///"])
def test_the_target_names_its_file_safely(base: Model, tmp_path: Path, concept: str) -> None:
    edit = Edit({base.sites[0]: Dense(torch.zeros(base.sites[0].shape))}, "mine", concept)
    EditFile().export(base.with_edit(edit), tmp_path / "deep" / "out", Context())
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.parent == tmp_path / "deep" / "out"
    assert edits.read(file)[0][0].concept == concept
