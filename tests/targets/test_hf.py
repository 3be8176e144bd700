"""Target hf: the copy equals the checkpoint byte for byte, and a NaN in it fails a check."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from erasec.base import Check, Context
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import patch_file, read_header, read_tensor
from erasec.targets.hf import Hf, same_layout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_named(checks: tuple[Check, ...], name: str) -> Check:
    (check,) = (item for item in checks if item.name == name)
    return check


@pytest.fixture
def copy(random_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(random_folder, tmp_path / "copy"))


def with_value(folder: Path, value: float) -> None:
    """Set one number of the VAE."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    key, entry = next(iter(read_header(file)[0].items()))
    tensor = read_tensor(entry)
    tensor.view(-1)[0] = value
    patch_file(file, file, {key: lambda: tensor})


def test_the_copy_has_every_byte_of_the_checkpoint(random_folder: Path, tmp_path: Path) -> None:
    Hf().check()
    artifact = Hf().export(Folder(random_folder), tmp_path / "hf", Context())
    assert contents(tmp_path / "hf") == contents(random_folder)
    assert artifact.target == "hf"
    assert artifact.path == tmp_path / "hf"
    assert {check.name for check in artifact.checks} == {"finite", "layout"}
    assert all(check.passed and check.value == 0 == check.limit for check in artifact.checks)


def test_every_floating_tensor_is_read(random_folder: Path, tmp_path: Path) -> None:
    folder = Folder(random_folder)
    entries = [entry for part in ("text_encoder", "unet", "vae") for entry in folder.entries(part).values()]
    count = sum(entry.dtype == "F16" for entry in entries)
    assert (
        f"all {count} floating tensors"
        in check_named(Hf().export(folder, tmp_path / "hf", Context()).checks, "finite").how
    )


def test_a_checkpoint_that_lies_there_already_is_only_checked(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    artifact = Hf().export(Folder(copy), copy / ".." / copy.name, Context())
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert [(check.name, check.passed) for check in artifact.checks] == [("finite", True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_fails(copy: Path, tmp_path: Path, value: float) -> None:
    with_value(copy, value)
    check = check_named(Hf().export(Folder(copy), tmp_path / "hf", Context()).checks, "finite")
    assert not check.passed
    assert check.value == 1
    assert "vae/diffusion_pytorch_model.safetensors" in check.how


def test_a_copy_of_another_layout_fails(random_folder: Path, copy: Path) -> None:
    assert same_layout(Folder(random_folder), Folder(copy)).passed
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    # Another dtype name of the same width: sizes and keys stay as they are.
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"F16"', b'"I16"', 1))
    check = same_layout(Folder(random_folder), Folder(copy))
    assert not check.passed
    assert check.value == 1
    assert "unet/diffusion_pytorch_model.safetensors" in check.how
    file.write_bytes(data)
    (copy / "scheduler" / "more.json").write_text("{}")
    check = same_layout(Folder(random_folder), Folder(copy))
    assert not check.passed
    assert "scheduler/more.json" in check.how


def test_the_copy_loads_in_diffusers(random_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    Hf().export(Folder(random_folder), tmp_path / "hf", Context())
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "hf" / "unet", torch_dtype=torch.float16)
    entry = Folder(random_folder).entries("unet")["conv_in.weight"]
    assert torch.equal(unet.conv_in.weight, read_tensor(entry))
