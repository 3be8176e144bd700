"""Views of a model: they are read lazily, edited as new views, and known by their digest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.edit import Dense, Edit, LowRank, merge


def test_with_edit_is_a_new_view_and_sums_in_float64(random_folder: Path) -> None:
    base = loading.load(str(random_folder))
    site = base.select("cross", "v")[0]
    left, right = torch.randn(site.shape[0], 2).double(), torch.randn(2, site.shape[1]).double()
    value = torch.full(site.shape, 1e-4)
    edited = base.with_edit(Edit({site: LowRank(left, right)}, "a", ("x",), "")).with_edit(
        Edit({site: Dense(value)}, "b", ("x",), "")
    )
    assert not base.edits
    assert not base.merged()
    wanted = base.stored_weight(site).double() + left @ right + value.double()
    assert torch.equal(edited.weight(site), wanted)
    merged = edited.merged()["unet"][site.key]()
    assert merged.dtype == torch.float16
    assert torch.equal(merged, wanted.half())
    assert list(edited.merged()["unet"]) == [site.key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [Dense(torch.full((4, 6), 1e-5)) for _ in range(50)]
    assert torch.equal(merge(weight, parts), (weight.double() + 50 * torch.tensor(1e-5).double()).to(dtype))


def test_an_edit_of_an_unknown_site_is_refused(random_folder: Path) -> None:
    base = loading.load(str(random_folder))
    site = base.sites[0]
    other = type(site)("unet", "nowhere.weight", site.shape, "cross", "k", "down.0")
    with pytest.raises(ErasecError, match="nowhere"):
        base.with_edit(Edit({other: Dense(torch.zeros(site.shape))}, "me", ("x",), ""))


def test_encode_finds_the_last_subject_token(random_folder: Path) -> None:
    tokens = loading.load(str(random_folder)).encode(["", "star", "a photo of a star"])
    assert tokens.states.shape == (3, 77, 128)
    assert tokens.last.tolist()[:2] == [0, 1]
    assert tokens.last[2] > tokens.last[1]


def test_digest_is_of_the_content(random_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_folder, copy)
    one, two = loading.load(str(random_folder)), loading.load(str(copy))
    assert one.digest == two.digest
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(path)[0].items()}
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    checkpoint.save_tensors(path, tensors)
    assert loading.load(str(copy)).digest != one.digest


def test_an_edit_made_for_another_base_is_refused(random_folder: Path) -> None:
    base = loading.load(str(random_folder))
    nothing = Dense(torch.zeros(base.sites[0].shape))
    assert base.with_edit(Edit({base.sites[0]: nothing}, "me", ("x",), base.digest)).digest == base.digest
    with pytest.raises(ErasecError, match="another model"):
        base.with_edit(Edit({base.sites[0]: nothing}, "me", ("x",), "0" * 64))


def test_the_same_weights_under_other_keys_have_another_digest(random_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    start = "text_model."
    renamed = {
        key.removeprefix(start) if key.startswith(start) else start + key: value for key, value in tensors.items()
    }
    checkpoint.save_tensors(file, renamed)
    one, two = loading.load(str(random_folder)), loading.load(str(copy))
    assert one.component_digest("unet") == two.component_digest("unet")
    assert one.component_digest("text_encoder") != two.component_digest("text_encoder")
    assert one.digest != two.digest
