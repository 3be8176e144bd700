"""Reading and writing safetensors: only what was asked moves, whole files or none, the same bytes every time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasec import checkpoint
from erasec.checkpoint import Folder
from erasec.errors import ErasecError


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3, generator=draw),
        "a.weight": torch.randn(4, 2, generator=draw).half(),
        "c.bias": torch.randn(7, generator=draw).bfloat16(),
        "ids": torch.arange(6).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def test_save_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.safetensors", tensors(), {"zeta": "1", "alpha": "2"})
    entries, metadata = checkpoint.read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "zeta": "1", "alpha": "2"}
    library = load_file(tmp_path / "x.safetensors")
    for key, tensor in tensors().items():
        assert torch.equal(checkpoint.read_tensor(entries[key]), tensor), key
        assert torch.equal(library[key], tensor), key


def test_same_content_same_bytes_in_any_order(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(12)}
    checkpoint.save(tmp_path / "x", tensors(), metadata)
    checkpoint.save(tmp_path / "y", dict(reversed(tensors().items())), dict(reversed(metadata.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_patch_moves_the_named_tensor_and_not_one_other_byte(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base", metadata={"format": "pt"})
    checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: tensors()["b.weight"] + 1})
    before, after = (tmp_path / "base").read_bytes(), (tmp_path / "new").read_bytes()
    entry = checkpoint.read_header(tmp_path / "base")[0]["b.weight"]
    assert before[: entry.start] == after[: entry.start]
    assert before[entry.stop :] == after[entry.stop :]
    assert before[entry.start : entry.stop] != after[entry.start : entry.stop]
    assert torch.equal(load_file(tmp_path / "new")["b.weight"], tensors()["b.weight"] + 1)


@pytest.mark.parametrize("wrong", [torch.zeros(5, 3).half(), torch.zeros(3, 5)])
def test_patch_refuses_another_dtype_or_shape_and_leaves_nothing(tmp_path: Path, wrong: torch.Tensor) -> None:
    save_file(tensors(), tmp_path / "base")
    with pytest.raises(ErasecError, match=r"b\.weight"):
        checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": lambda: wrong})
    assert os.listdir(tmp_path) == ["base"]


def test_a_failure_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "base")
    (tmp_path / "new").write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.patch(tmp_path / "base", tmp_path / "new", {"b.weight": fail})
    assert (tmp_path / "new").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["base", "new"]


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "length", "empty"])
def test_a_damaged_file_is_an_error_in_words(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, tensors())
    data = path.read_bytes()
    path.write_bytes({
        "cut": data[:-3], "longer": data + b"x", "header": data[:8] + b"{{" + data[10:],
        "length": (10**12).to_bytes(8, "little") + data[8:], "empty": b"",
    }[damage])  # fmt: skip
    with pytest.raises(ErasecError, match="no whole safetensors file"):
        checkpoint.read_header(path)


def test_content_digest_ignores_layout_and_sees_one_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ours", tensors())
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt", "more": "words"})
    changed = tensors()
    changed["c.bias"][3] += 1
    checkpoint.save(tmp_path / "changed", changed)
    ours, theirs, other = (
        checkpoint.content_digest(checkpoint.read_header(tmp_path / name)[0]) for name in ("ours", "theirs", "changed")
    )
    assert ours == theirs != other


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


def test_sharded_weights_are_found_and_pickles_refused(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        Folder(tmp_path).entries("unet")
    assert "run code" in caught.value.why
    checkpoint.save(unet / "part1.safetensors", {"x": torch.ones(2)})
    checkpoint.save(unet / "part2.safetensors", {"y": torch.ones(3)})
    index = {"weight_map": {"x": "part1.safetensors", "y": "part2.safetensors"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(Folder(tmp_path).entries("unet")) == ["x", "y"]
    Folder(tmp_path).write(tmp_path / "out", {"unet": {"y": lambda: torch.zeros(3)}})
    written = Folder(tmp_path / "out").entries("unet")
    assert torch.equal(checkpoint.read_tensor(written["y"]), torch.zeros(3))
    assert torch.equal(checkpoint.read_tensor(written["x"]), torch.ones(2))
