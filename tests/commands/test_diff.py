from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import random_models
import torch

from erasec.base import Context
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.commands.diff import Difference, compare, locate, rank
from erasec.errors import ErasecError
from erasec.model.loading import load
from erasec.targets.ldm import Ldm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (64, 48), "b.weight": (32, 16, 3, 3), "b.bias": (32,), "empty": (0, 4)}
    return {key: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for key, shape in shapes.items()}


def update(shape: tuple[int, int], count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(shape[0], count, generator=generator), torch.randn(count, shape[1], generator=generator)
    return 0.01 * left.double() @ right.double()


def folder(path: Path, content: dict[str, torch.Tensor]) -> Path:
    checkpoint.save_tensors(path / "unet" / "diffusion_pytorch_model.safetensors", content)
    (path / "model_index.json").write_text("{}")
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_rank_of_a_merged_update_is_found_under_the_rounding(dtype: torch.dtype, count: int) -> None:
    base = tensors(dtype)["a.weight"]
    merged = (base.double() + update((64, 48), count)).to(dtype)
    assert rank(base, merged) == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_alone_fills_the_naive_rank_and_a_dense_change_is_reported_as_dense(dtype: torch.dtype) -> None:
    base = tensors(dtype)["a.weight"]
    merged = (base.double() + update((64, 48), 2)).to(dtype)
    assert int(torch.linalg.matrix_rank(merged.double() - base.double())) == 48
    assert rank(base, (base.double() + update((64, 48), 64)).to(dtype)) == 48


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_moved_tensor_is_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tensors(dtype)
    merged = {**base, "a.weight": (base["a.weight"].double() + update((64, 48), 2)).to(dtype)}
    differences = compare(folder(tmp_path / "a", base), folder(tmp_path / "b", merged))
    assert [(item.kind, item.key, item.rank) for item in differences] == [("moved", "unet/a.weight", 2)]
    moved = merged["a.weight"].double() - base["a.weight"].double()
    assert differences[0].change == pytest.approx(float(moved.norm() / base["a.weight"].double().norm()), rel=1e-12)
    assert differences[0].largest == float(moved.abs().max())


def test_an_edited_site_of_a_whole_checkpoint(tmp_path: Path, random_folder: Path) -> None:
    model = load(str(random_folder))
    site = model.select("cross", "k")[0]
    weight = model.stored_weight(site)
    change = 0.1 * update((weight.shape[0], weight.shape[1]), 2)
    Folder(random_folder).write(
        tmp_path / "out", {"unet": {site.key: lambda: (weight.double() + change).to(weight.dtype)}}
    )
    differences = compare(random_folder, tmp_path / "out")
    assert [(item.kind, item.key, item.rank) for item in differences] == [("moved", f"unet/{site.key}", 2)]


def test_the_same_is_the_same_however_it_is_laid_out(tmp_path: Path) -> None:
    base = tensors(torch.float16)
    a, b = folder(tmp_path / "a", base), tmp_path / "b"
    assert compare(a, folder(tmp_path / "c", base)) == []
    shards = [{key: base[key] for key in keys} for keys in (("a.weight", "empty"), ("b.weight", "b.bias"))]
    for root, name in (
        (tmp_path / "new", "model.fp16-0000{}-of-00002"),
        (tmp_path / "old", "model-0000{}-of-00002.fp16"),
    ):
        for number, shard in enumerate(shards, 1):
            checkpoint.save_tensors(root / "unet" / f"{name.format(number)}.safetensors", shard)
    assert compare(tmp_path / "new", tmp_path / "old") == []
    for number, shard in enumerate(shards, 1):
        checkpoint.save_tensors(b / "unet" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors", shard)
    (b / "model_index.json").write_text("{}")
    assert compare(a, b) == []


def test_differences_that_are_no_move_are_reported_separately(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    other = {
        "a.weight": base["a.weight"].half(),
        "b.weight": base["b.weight"][:16],
        "b.bias": base["b.bias"].clone(),
        "c": torch.ones(2),
    }
    other["b.bias"][3] = torch.nan
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", other)
    (b / "model_index.json").write_text("{ }")
    (a / "notes.txt").write_text("x")
    differences = {item.key: item for item in compare(a, b)}
    assert differences["unet/a.weight"].note == "float32 -> float16"
    assert differences["unet/a.weight"].rank == 0
    assert differences["unet/b.weight"] == Difference("shape", "unet/b.weight", "[32, 16, 3, 3] -> [16, 16, 3, 3]")
    assert differences["unet/b.bias"] == Difference("moved", "unet/b.bias", "float32 [32], not finite")
    assert differences["unet/c"].kind == "only in B"
    assert differences["unet/empty"].kind == "only in A"
    assert differences["model_index.json"] == Difference("file", "model_index.json", "content differs")
    assert differences["notes.txt"] == Difference("file", "notes.txt", "only in A")
    assert len(differences) == 7


def test_two_files_beside_each_other_do_not_hide_each_other(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    a, b = folder(tmp_path / "a", base), folder(tmp_path / "b", base)
    for root, scale in ((a, 1), (b, 2)):
        checkpoint.save_tensors(root / "unet" / "extra.safetensors", {"b.bias": base["b.bias"] * scale})
    assert [item.key for item in compare(a, b)] == ["unet/extra/b.bias"]


def test_two_files(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    checkpoint.save_tensors(tmp_path / "a.safetensors", base)
    checkpoint.save_tensors(tmp_path / "b.safetensors", {**base, "b.bias": base["b.bias"] + 1})
    (differences,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (differences.key, differences.rank, differences.largest) == ("b.bias", None, pytest.approx(1.0, rel=1e-6))
    shutil.copyfile(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert compare(tmp_path / "a.safetensors", tmp_path / "c.safetensors") == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_and_its_single_file_are_the_same_but_for_what_moved(tmp_path: Path, family: str) -> None:
    """Old names in the VAE, and tensors that the file joins or transposes, as in SDXL's second text encoder."""
    random_models.random_folder(tmp_path / "a", family, dtype="float16")
    model = Folder(tmp_path / "a")
    Ldm().export(model, tmp_path, Context())
    file = tmp_path / "model.safetensors"
    assert compare(tmp_path / "a", file) == compare(file, tmp_path / "a") == []
    moved = {"unet": "conv_in.weight", "text_encoder": "text_model.final_layer_norm.bias"}
    if family == "sdxl":
        moved["text_encoder_2"] = "text_projection.weight"

    def doubled(component: str, key: str) -> Callable[[], torch.Tensor]:
        return lambda: 2 * checkpoint.read_tensor(model.entries(component)[key])

    model.write(tmp_path / "b", {component: {key: doubled(component, key)} for component, key in moved.items()})
    differences = compare(file, tmp_path / "b")
    assert [(item.kind, item.key) for item in differences] == [
        ("moved", f"{component}/{key}") for component, key in sorted(moved.items())
    ]
    assert all(item.change == pytest.approx(1) for item in differences)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", tensors(torch.float32))
    checkpoint.save_tensors(tmp_path / "part.safetensors", tensors(torch.float32))
    with pytest.raises(ErasecError, match="this file is no single-file checkpoint"):
        compare(a, tmp_path / "part.safetensors")
    (tmp_path / "x").mkdir()
    with pytest.raises(ErasecError, match="x cannot be compared with a file"):
        compare(tmp_path / "part.safetensors", tmp_path / "x")
    with pytest.raises(ErasecError, match="no safetensors weights"):
        compare(tmp_path / "x", tmp_path / "x")
    with pytest.raises(ErasecError, match="no folder or file"):
        locate(str(tmp_path / "none"))


def test_a_build_stands_for_its_plain_checkpoint(tmp_path: Path) -> None:
    folder(tmp_path / "out" / "hf", tensors(torch.float32))
    assert locate(str(tmp_path / "out")) == tmp_path / "out" / "hf"
    assert locate(str(tmp_path)) == tmp_path
