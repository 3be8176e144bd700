"""Diffusers folders: the right file of a component's weights, and copies in which only the given tensors change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.model import loading


def test_folder_write_keeps_every_other_file_to_the_byte(random_folder: Path, tmp_path: Path) -> None:
    folder = Folder(random_folder)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    old = checkpoint.read_tensor(folder.entries("unet")[key])
    folder.write(tmp_path / "out", {"unet": {key: lambda: old * 2}})
    assert Folder(tmp_path / "out").files() == folder.files()
    moved = [
        name for name in folder.files() if (random_folder / name).read_bytes() != (tmp_path / "out" / name).read_bytes()
    ]
    assert [name.as_posix() for name in moved] == ["unet/diffusion_pytorch_model.safetensors"]
    new = Folder(tmp_path / "out").entries("unet")
    assert torch.equal(checkpoint.read_tensor(new[key]), old * 2)


def test_sharded_weights_are_read_and_pickles_refused(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        Folder(tmp_path).entries("unet")
    assert "run code" in caught.value.why
    checkpoint.save_tensors(unet / "part1.safetensors", {"x": torch.ones(2)})
    checkpoint.save_tensors(unet / "part2.safetensors", {"y": torch.ones(3)})
    index = {"weight_map": {"x": "part1.safetensors", "y": "part2.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(Folder(tmp_path).entries("unet")) == ["x", "y"]
    Folder(tmp_path).write(tmp_path / "out", {"unet": {"y": lambda: torch.zeros(3)}})
    written = Folder(tmp_path / "out").entries("unet")
    assert torch.equal(checkpoint.read_tensor(written["y"]), torch.zeros(3))
    assert torch.equal(checkpoint.read_tensor(written["x"]), torch.ones(2))


KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("link", [True, False])
def test_linked_files_are_one_file_and_patched_ones_are_not(random_folder: Path, tmp_path: Path, link: bool) -> None:
    folder, out = Folder(random_folder), tmp_path / "out"
    before = {name: (random_folder / name).read_bytes() for name in folder.files()}
    old = checkpoint.read_tensor(folder.entries("unet")[KEY])
    try:
        for _ in range(2):  # the second time, over what is there
            folder.write(out, {"unet": {KEY: lambda: old * 2}}, link=link)
        same = {name for name in folder.files() if os.path.samefile(random_folder / name, out / name)}
        patched = Path("unet/diffusion_pytorch_model.safetensors")
        assert same == (set(folder.files()) - {patched} if link else set())
        assert torch.equal(checkpoint.read_tensor(Folder(out).entries("unet")[KEY]), old * 2)
        folder.write(out, {})  # files that were links become copies, and the base keeps its bytes
        assert not any(os.path.samefile(random_folder / name, out / name) for name in folder.files())
    finally:
        assert {name: (random_folder / name).read_bytes() for name in before} == before
    assert {path.name for path in out.rglob(".*")} == set()


def test_links_are_copies_where_the_file_system_has_none(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    Folder(random_folder).write(tmp_path / "out", {}, link=True)
    for name in Folder(random_folder).files():
        assert (tmp_path / "out" / name).read_bytes() == (random_folder / name).read_bytes()


def test_other_programs_copies_of_what_was_edited_are_left_behind(tmp_path: Path) -> None:
    copies = {
        f"unet/{name}"
        for name in (
            "model.onnx",
            "model.onnx_data",
            "model.onnx.data",
            "openvino_model.xml",
            "openvino_model.bin",
            "weights.pb",
            "model.gguf",
            "diffusion_flax_model.msgpack",
        )
    }
    folder = put(tmp_path / "in", PLAIN, "vae/diffusion_pytorch_model.safetensors")
    others = {"unet/config.json", "vae/model.onnx"}
    for name in copies | others:
        (tmp_path / "in" / name).touch()
    assert {path.as_posix() for path in folder.other_copies(["unet"])} == copies
    folder.write(tmp_path / "out", {"unet": {"x": lambda: torch.tensor([7])}})
    written = {path.as_posix() for path in Folder(tmp_path / "out").files()}
    assert others < written and not copies & written


def test_a_folder_is_not_written_into_itself(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(random_folder)
    with pytest.raises(ErasecError, match="is the model itself"):
        Folder(random_folder).write(tmp_path / "same", {})


def put(root: Path, *names: str) -> Folder:
    """A folder with one small tensor in each safetensors file, whose value is the file's place in ``names``."""
    root.mkdir(exist_ok=True)
    (root / "model_index.json").write_text("{}")
    for number, name in enumerate(names):
        (root / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            shards = [f"{Path(name).name.split('.safetensors')[0]}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
            shards = [shard.replace(".fp16.fp16", ".fp16") for shard in shards]
            (root / name).write_text(json.dumps({"weight_map": {"x": shards[0], "y": shards[1]}}))
            for key, shard in zip("xy", shards, strict=True):
                checkpoint.save_tensors((root / name).parent / shard, {key: torch.tensor([number])})
        else:
            checkpoint.save_tensors(root / name, {"x": torch.tensor([number])})
    return Folder(root)


PLAIN, FP16, NON_EMA = (f"unet/diffusion_pytorch_model{name}.safetensors" for name in ("", ".fp16", ".non_ema"))


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([PLAIN, FP16, NON_EMA], "", PLAIN),
        ([PLAIN, FP16, NON_EMA], "fp16", FP16),
        ([PLAIN, FP16, NON_EMA], "non_ema", NON_EMA),
        ([FP16], "", FP16),
        ([NON_EMA, PLAIN], "", PLAIN),
        ([PLAIN, "vae/diffusion_pytorch_model.fp16.safetensors"], "fp16", PLAIN),
        (["unet/model.fp16.safetensors"], "fp16", "unet/model.fp16.safetensors"),
    ],
)
def test_a_variant_is_chosen(tmp_path: Path, names: list[str], variant: str, chosen: str) -> None:
    put(tmp_path, *names)
    assert Folder(tmp_path, variant).weight_files("unet") == (tmp_path / chosen,)


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("variant", ["fp16", ""])
def test_shards_of_a_variant_are_found_by_any_index(tmp_path: Path, index: str, variant: str) -> None:
    put(tmp_path, f"unet/{index}")
    folder = Folder(tmp_path, variant)
    assert sorted(folder.entries("unet")) == ["x", "y"] and len(folder.weight_files("unet")) == 2
    assert folder.other_copies(["unet"]) == ()
    put(tmp_path, PLAIN, f"unet/{index}")
    plain = Folder(tmp_path).other_copies(["unet"])
    assert {path.name for path in plain} == {index, *(path.name for path in folder.root.glob("unet/*-of-*"))}
    assert Folder(tmp_path, "fp16").other_copies(["unet"]) == (Path(PLAIN),)


@pytest.mark.parametrize("variant", ["", "bf16"])
def test_only_several_variants_is_an_error_that_lists_them(tmp_path: Path, variant: str) -> None:
    put(tmp_path, FP16, NON_EMA, "vae/diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ErasecError, match="no safetensors weights for unet") as caught:
        Folder(tmp_path, variant).weight_files("unet")
    assert "fp16, non_ema" in caught.value.why
    assert 'variant = "fp16"' in caught.value.fix and "--variant fp16" in caught.value.fix


def test_a_variant_that_no_component_has_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, PLAIN, FP16)
    with pytest.raises(ErasecError, match="no component has the variant 'fp8'") as caught:
        Folder(tmp_path, "fp8").weight_files("unet")
    assert "the plain one, fp16" in caught.value.why


def test_shards_that_are_not_there_or_overlap_are_errors(tmp_path: Path) -> None:
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    folder = put(tmp_path, index)
    first, second = folder.weight_files("unet")
    checkpoint.save_tensors(second, {"x": torch.zeros(1), "y": torch.zeros(1)})
    with pytest.raises(ErasecError, match="unet has x twice"):
        folder.entries("unet")
    second.rename(tmp_path / second.name)
    with pytest.raises(ErasecError, match=f"{second.name} is not there"):
        folder.entries("unet")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"x": first.name, "y": f"../{second.name}"}}))
    with pytest.raises(ErasecError, match="is not there"):
        folder.entries("unet")
    (tmp_path / index).write_text("[]")
    with pytest.raises(ErasecError, match=r"index\.fp16\.json cannot be read"):
        folder.entries("unet")


class TestLinks:
    """Links in a model's folder: what lies outside of it must not be published with the result."""

    @pytest.mark.parametrize(
        ("name", "target", "why"),
        [
            ("tokenizer/notes.txt", "../../secret", "outside of the folder"),
            ("vae2", "vae", "folders behind links are not copied"),
            ("gone.txt", "../nowhere", "outside of the folder"),
            ("vae/loop", "..", "folders behind links are not copied"),
        ],
    )
    def test_links_out_of_the_folder_and_to_folders_are_refused(
        self, random_folder: Path, tmp_path: Path, name: str, target: str, why: str
    ) -> None:
        (tmp_path / "secret").write_text("mine")
        copy = shutil.copytree(random_folder, tmp_path / "model")
        (copy / name).symlink_to(target)
        with pytest.raises(ErasecError, match=f"{name} is a link") as caught:
            loading.load(str(copy))
        assert why in caught.value.why

    def test_links_in_the_folder_and_to_the_blobs_of_the_hub_are_read(
        self, random_folder: Path, tmp_path: Path
    ) -> None:
        snapshot = shutil.copytree(random_folder, tmp_path / "models--a--b" / "snapshots" / "1234")
        (tmp_path / "models--a--b" / "blobs").mkdir()
        file = snapshot / "model_index.json"
        file.rename(tmp_path / "models--a--b" / "blobs" / "abcd")
        file.symlink_to("../../blobs/abcd")
        (snapshot / "same.json").symlink_to("model_index.json")
        assert loading.load(str(snapshot)).family.name
        (snapshot / "other").symlink_to("../../../secret")
        with pytest.raises(ErasecError, match="other is a link"):
            loading.load(str(snapshot))


class TestChanges:
    """A model that another program writes while it is read."""

    FILE = "unet/diffusion_pytorch_model.safetensors"

    def write(self, file: Path, keep_time: bool = False) -> None:
        old = file.stat()
        with file.open("r+b") as stream:
            stream.seek(-1, 2)
            last = stream.read(1)
            stream.seek(-1, 2)
            stream.write(bytes([last[0] ^ 1]))
        if keep_time:
            os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))

    @pytest.mark.parametrize("how", ["written", "replaced", "gone", "time set back"])
    def test_a_change_is_an_error_that_names_the_file(self, random_folder: Path, tmp_path: Path, how: str) -> None:
        model = loading.load(str(shutil.copytree(random_folder, tmp_path / "model")))
        model.digest  # noqa: B018
        file = tmp_path / "model" / self.FILE
        if how == "gone":
            file.unlink()
        elif how == "replaced":
            shutil.copy2(file, tmp_path / "new")
            os.replace(tmp_path / "new", file)
        else:
            self.write(file, how == "time set back")
        with pytest.raises(ErasecError, match="has changed while it was read") as caught:
            model.check_unchanged()
        assert caught.value.where == str(file)

    def test_reading_linking_and_a_change_of_mode_are_none(self, random_folder: Path, tmp_path: Path) -> None:
        model = loading.load(str(shutil.copytree(random_folder, tmp_path / "model")))
        model.digest  # noqa: B018
        model.source.write(tmp_path / "copy", {}, link=True)
        (tmp_path / "model" / self.FILE).chmod(0o640)
        model.check_unchanged()
