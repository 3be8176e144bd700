"""Applying edit files to checkpoints: folders, single files, other bases, in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import random_folder as random_layout
from random_models import random_pipeline

from erasec.base import Context, Pass
from erasec.checkpoint import journal, manifest
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.checkpoint.safetensors import file_digest
from erasec.checkpoint.sealed import DIGEST
from erasec.checkpoint.staging import output
from erasec.commands.apply import apply
from erasec.commands.check import examine
from erasec.commands.combine import combine
from erasec.errors import CheckFailed, ErasecError
from erasec.model import edit_file, loading
from erasec.model.edit import Dense, Edit, merge
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, read_extras, write_extras
from erasec.model.view import Model
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept
from erasec.targets.ldm import Ldm

STAR = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
HEART = Concept(name="heart", erase=("heart",), anchor="ring", keep=("square", "box"))
RING = Concept(name="ring", erase=("ring",), anchor="box", keep=("arrow",))
UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def star(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edits") / "star.edit.safetensors"
    edited = base.with_edit(Uce().solve(base, STAR, Context()))
    edit_file.write_edits(path, edited.edits, edited.base_record())
    return path


def write(model: Model, step: Pass, concepts: list[Concept], path: Path) -> Path:
    for edit in step.solve_all(model, concepts, Context()):
        model = model.with_edit(edit)
    edit_file.write_edits(path, model.edits, model.base_record())
    return path


def merged(model: Model, file: Path, out: Path) -> Path:
    """What a build writes: the folder of the model with the file's edits."""
    for edit in edit_file.read_edits(file)[0]:
        model = model.with_edit(edit)
    model.source.write(out, model.merged())
    return out


def test_a_folder_gets_what_a_build_writes(base: Model, star: Path, tmp_path: Path) -> None:
    done = apply(star, str(base.source.root), tmp_path / "out")
    assert (done.tensors, done.notes) == (14, ())
    wanted = merged(base, star, tmp_path / "wanted")
    for name in base.source.files():
        assert (tmp_path / "out" / name).read_bytes() == (wanted / name).read_bytes()
    assert (wanted / UNET).read_bytes() != (base.source.root / UNET).read_bytes()
    assert (wanted / UNET).stat().st_size == (base.source.root / UNET).stat().st_size


def test_a_folder_gets_a_manifest_that_an_edit_in_place_renews(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differences() -> tuple[str, ...]:
        return manifest.compare(tmp_path / "out", manifest.read(tmp_path / "out")[0]).all

    apply(star, str(base.source.root), tmp_path / "out")
    assert manifest.read(tmp_path / "out")[0].files.keys() == {name.as_posix() for name in base.source.files()}
    assert differences() == ()
    ring = write(loading.load(str(tmp_path / "out")), Uce(), [RING], tmp_path / "ring.edit.safetensors")
    apply(ring, str(tmp_path / "out"), in_place=True)
    assert differences() == () and manifest.read(tmp_path / "out")[0].renewed == (UNET.as_posix(),)
    (tmp_path / "out" / UNET).write_bytes((base.source.root / UNET).read_bytes())
    assert differences() == (UNET.as_posix(),)


def test_in_place_gives_the_same_bytes_and_leaves_no_journal(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    before = file_digest(copy / UNET)
    apply(star, str(copy), in_place=True)
    assert (copy / UNET).read_bytes() == (merged(base, star, tmp_path / "wanted") / UNET).read_bytes()
    assert file_digest(copy / UNET) != before
    assert not journal.pending(copy)
    with pytest.raises(ErasecError, match="another model"):
        apply(star, str(copy), in_place=True)  # a second time is another base


def test_unchanged_files_are_hard_linked_on_request(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    apply(star, str(copy), tmp_path / "out", link=True)
    vae = Path("vae/diffusion_pytorch_model.safetensors")
    assert os.path.samefile(copy / vae, tmp_path / "out" / vae)
    assert not os.path.samefile(copy / UNET, tmp_path / "out" / UNET)
    with pytest.raises(ErasecError, match="in place") as caught:
        journal.patch_in_place({copy / vae: {"quant_conv.bias": lambda: torch.zeros(8).half()}})
    assert "2 names" in caught.value.why


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_stays_one_with_all_other_bytes_unchanged(family: str, tmp_path: Path) -> None:
    random_layout(tmp_path / "base", family, "tiny", dtype="float16")
    Ldm().export(Folder(tmp_path / "base"), tmp_path / "ldm", Context())
    file = tmp_path / "ldm" / "model.safetensors"
    folder, single = loading.load(str(tmp_path / "base")), loading.load(str(file))
    edit = write(folder, Uce(), [STAR], tmp_path / "star.edit.safetensors")
    done = apply(edit, str(file), tmp_path / "out.safetensors")
    assert done.tensors == sum(map(len, folder.streams.values()))
    old, new = (checkpoint.read_header(path)[0] for path in (file, tmp_path / "out.safetensors"))
    moved = {key for key in old if not torch.equal(*(checkpoint.read_tensor(each[key]) for each in (old, new)))}
    assert len(moved) == done.tensors
    assert all(".attn2.to_" in key or ".label_emb.0.0." in key for key in moved)
    view = loading.load(str(tmp_path / "out.safetensors"))
    wanted = folder.with_edit(edit_file.read_edits(edit)[0][0])
    for site in folder.streams["context"]:
        assert torch.equal(view.stored_weight(site), wanted.merged_weight(site))
    assert torch.equal(single.encode(["a star"]).states, folder.encode(["a star"]).states)
    metadata, sealed_metadata = (checkpoint.read_header(path)[1] for path in (file, tmp_path / "out.safetensors"))
    assert sealed_metadata == metadata | {DIGEST: sealed_metadata[DIGEST]}
    apply(edit, str(file), in_place=True)
    data, sealed_data = (path.read_bytes() for path in (file, tmp_path / "out.safetensors"))
    start, sealed_start = (8 + int.from_bytes(each[:8], "little") for each in (data, sealed_data))
    assert sealed_data[sealed_start:] == data[start:]
    assert list(checkpoint.read_header(file)[0]) == list(new)


def test_a_single_file_carries_a_digest_that_check_compares_and_later_edits_renew(tmp_path: Path) -> None:
    random_layout(tmp_path / "base", "sd1", "tiny", dtype="float16")
    Ldm().export(Folder(tmp_path / "base"), tmp_path, Context())
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    model = str(tmp_path / "model.safetensors")
    apply(write(loading.load(model), Uce(), [STAR], tmp_path / "star.edit.safetensors"), model, out)

    def outcome(file: Path) -> bool:
        (check,) = examine(file).checks
        return check.passed

    assert outcome(out)
    good = out.read_bytes()
    heart = write(loading.load(str(out)), Uce(), [HEART], tmp_path / "heart.edit.safetensors")
    for place in (good.index(b"modelspec.") + 30, len(good) - 1):
        out.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert not outcome(out)
    for more in ({"in_place": True}, {"out": again}):
        with pytest.raises(ErasecError, match=r"out\.safetensors is damaged"):
            apply(heart, str(out), **more)  # type: ignore[arg-type]
    assert not again.exists() and not journal.pending(out)
    out.write_bytes(good)
    apply(heart, str(out), again)
    apply(heart, str(out), in_place=True)
    assert out.read_bytes() == again.read_bytes() != good
    assert outcome(out)
    with pytest.raises(ErasecError, match="cannot be checked"):
        examine(Path(model))


def test_another_base_is_refused_and_with_transfer_noted(base: Model, star: Path, tmp_path: Path) -> None:
    random_pipeline(tmp_path / "other", seed=1, dtype=torch.float16)
    with pytest.raises(ErasecError, match="another model") as caught:
        apply(star, str(tmp_path / "other"), tmp_path / "out")
    assert "14 of the 14" in caught.value.why and "--transfer" in caught.value.fix
    assert not (tmp_path / "out").exists()
    done = apply(star, str(tmp_path / "other"), tmp_path / "out", transfer=True)
    assert "not measured" in " ".join(done.notes) and "14 of the 14 edited tensors differ here" in done.notes[0]
    site = base.streams["context"][0]
    other = loading.load(str(tmp_path / "other"))
    delta = edit_file.read_edits(star)[0][0].deltas[site]
    result, stored = loading.load(str(tmp_path / "out")).stored_weight(site), other.stored_weight(site)
    assert torch.equal(result, merge(stored, [delta]))
    # ``merge`` computes in float32, so that a few numbers are rounded to the other neighbour.
    torch.testing.assert_close(result.double(), stored.double() + delta.change(stored), rtol=2**-10, atol=1e-7)
    assert not torch.equal(result, stored)


def test_another_family_is_refused_even_with_transfer(star: Path, tmp_path: Path) -> None:
    random_layout(tmp_path / "sd2", "sd2", "tiny")
    with pytest.raises(ErasecError, match="sd2"):
        apply(star, str(tmp_path / "sd2"), tmp_path / "out", transfer=True)


def test_the_place_of_the_result_must_be_clear_and_free(base: Model, star: Path, tmp_path: Path) -> None:
    root = str(base.source.root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tries: list[tuple[Callable[[], object], str]] = [
        (lambda: apply(star, root), "not clear"),
        (lambda: apply(star, root, tmp_path / "out", in_place=True), "not clear"),
        (lambda: apply(star, root, tmp_path / "full"), "not empty"),
        (lambda: apply(star, root, tmp_path / "a.safetensors"), "a single file"),
        (lambda: apply(star, "glyphs", in_place=True, transfer=True), "not edited in place"),
    ]
    for attempt, words in tries:
        with pytest.raises(ErasecError, match=words):
            attempt()


def test_numbers_that_overflow_stop_everything(base: Model, tmp_path: Path) -> None:
    site = base.streams["context"][0]
    wild = Edit({site: Dense(torch.full(site.shape, 1e6))}, "wild", ("star",), "")
    edit_file.write_edits(tmp_path / "wild.edit.safetensors", [wild], base.with_edit(wild).base_record())
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    before = file_digest(copy / UNET)
    for out, in_place in ((tmp_path / "out", False), (None, True)):
        with pytest.raises(CheckFailed, match="not finite"):
            apply(tmp_path / "wild.edit.safetensors", str(copy), out, in_place)
    assert file_digest(copy / UNET) == before
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


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
    (edit,), about = edit_file.read_edits(star)
    more = tmp_path / "more.edit.safetensors"
    edit_file.write_edits(more, [replace(edit, **carried)], about)  # type: ignore[arg-type]
    for refused in (
        lambda: apply(more, base.name, tmp_path / "out"),
        lambda: combine([more], (), tmp_path / "both.edit.safetensors"),
    ):
        with pytest.raises(ErasecError, match=r"more\.edit\.safetensors") as caught:
            refused()
        assert words in caught.value.why and "erasec build" in caught.value.fix
    assert os.listdir(tmp_path) == [more.name]
    assert combine([star], (), tmp_path / "both.edit.safetensors").concepts == ("star",)


def test_the_extras_of_a_folder_stay_with_it(base: Model, star: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(base.source.root, tmp_path / "bundle")
    write_extras(bundle, Extras(negative="a ring"))
    done = apply(star, str(bundle), tmp_path / "out")
    assert read_extras(tmp_path / "out").negative == "a ring" and done.notes == ()
    assert (tmp_path / "out" / EXTRAS_FILE).read_bytes() == (bundle / EXTRAS_FILE).read_bytes()


def test_unedited_copies_are_named_and_stop_an_edit_in_place(base: Model, star: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    copies = ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", f"{UNET.with_suffix('.fp16.safetensors')}")
    for name in copies:
        shutil.copyfile(copy / UNET, copy / name)
    before = file_digest(copy / UNET)
    with pytest.raises(ErasecError, match="not edited in place") as caught:
        apply(star, str(copy), in_place=True)
    assert file_digest(copy / UNET) == before
    (note,) = apply(star, str(copy), tmp_path / "out").notes
    for name in copies:
        assert name in caught.value.why and name in note
        assert not (tmp_path / "out" / name).exists()
        (copy / name).unlink()
    assert apply(star, str(copy), in_place=True).notes == ()


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_are_a_variant_say_how_to_load_them(
    base: Model, star: Path, tmp_path: Path, in_place: bool
) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    (copy / UNET).rename((copy / UNET).with_suffix(".fp16.safetensors"))
    (note,) = apply(star, str(copy), None if in_place else tmp_path / "out", in_place).notes
    assert 'variant="fp16"' in note


def test_no_existing_file_is_replaced(base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_layout(tmp_path / "base", "sd1", "tiny", dtype="float16")
    Ldm().export(Folder(tmp_path / "base"), tmp_path / "ldm", Context())
    folder, file = shutil.copytree(base.source.root, tmp_path / "folder"), tmp_path / "ldm" / "model.safetensors"
    edit = write(loading.load(str(file)), Uce(), [STAR], tmp_path / "single.edit.safetensors")
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
            apply(each, str(model), out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    for name in ("empty", "model-v1.4"):
        assert apply(edit, str(file), tmp_path / name).notes == ()
        assert (tmp_path / name / "model_index.json").is_file()
    with pytest.raises(ErasecError, match="--link is for folders"):
        apply(edit, str(file), tmp_path / "new.safetensors", link=True)
    with pytest.raises(ErasecError, match="--link is for copies"):
        apply(edit, str(file), in_place=True, link=True)


def test_a_model_of_the_hub_is_not_edited_in_place(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(base.source.root, tmp_path / "copy")
    cached = replace(loading.load(str(copy)), revision="0123abcd")
    monkeypatch.setattr(loading, "load", lambda *arguments: cached)
    before = file_digest(copy / UNET)
    with pytest.raises(ErasecError, match="not edited in place") as caught:
        apply(star, "owner/model", in_place=True)
    assert "cache" in caught.value.why
    assert file_digest(copy / UNET) == before
    assert apply(star, "owner/model", tmp_path / "out").tensors == 14


def test_headers_are_not_read_once_for_every_tensor(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint.read_header
    opened: list[Path] = []
    for module in ("safetensors", "folder"):
        monkeypatch.setattr(
            f"erasec.checkpoint.{module}.read_header", lambda file: (opened.append(file), read(file))[1]
        )
    apply(star, str(base.source.root), tmp_path / "out")
    assert 0 < opened.count(base.source.root / UNET) <= 5


@pytest.mark.parametrize("single", [False, True])
def test_a_model_that_changes_meanwhile_is_an_error_and_nothing_is_written(
    base: Model, star: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    if single:
        random_layout(tmp_path / "folder", "sd1", "tiny", dtype="float16")
        Ldm().export(Folder(tmp_path / "folder"), tmp_path / "ldm", Context())
        model = loading.load(str(tmp_path / "ldm" / "model.safetensors"))
        edit, name, file, out = (
            write(model, Uce(), [STAR], tmp_path / "e"),
            model.name,
            Path(model.name),
            "o.safetensors",
        )
    else:
        copy = shutil.copytree(base.source.root, tmp_path / "copy")
        edit, name, file, out = star, str(copy), copy / "vae" / "config.json", "out"
    before = set(os.listdir(tmp_path))
    real = merge

    def change(*given: object) -> torch.Tensor:
        os.utime(file)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("erasec.model.view.merge", change)
    with pytest.raises(ErasecError, match="has changed while it was read"):
        apply(edit, name, tmp_path / out)
    assert set(os.listdir(tmp_path)) == before


def test_an_output_that_another_command_writes_is_refused(base: Model, star: Path, tmp_path: Path) -> None:
    with output(tmp_path / "out"), pytest.raises(ErasecError, match="another command is writing there"):
        apply(star, str(base.source.root), tmp_path / "out")
    assert os.listdir(tmp_path) == []
