"""Models: found by name, folder or hub id; read lazily; never changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from erasec import checkpoint, model
from erasec.edit import Dense, Edit, LowRank, merge
from erasec.errors import ErasecError
from erasec.family import detect


def test_a_folder_is_found_by_shapes(random_folder: Path) -> None:
    found = model.load(str(random_folder))
    assert found.family.name == "sd1"
    assert len(found.sites) == 56
    assert {site.attn for site in found.sites} == {"self", "cross"}
    assert len(found.select("cross", "kv")) == 14
    assert all(site.shape[1] == 128 for site in found.select("cross", "kv"))


def test_with_edit_is_a_new_view_and_sums_in_float64(random_folder: Path) -> None:
    base = model.load(str(random_folder))
    site = base.select("cross", "v")[0]
    left, right = torch.randn(site.shape[0], 2).double(), torch.randn(2, site.shape[1]).double()
    value = torch.full(site.shape, 1e-4)
    edited = base.with_edit(Edit({site: LowRank(left, right)}, "a", "x")).with_edit(
        Edit({site: Dense(value)}, "b", "x")
    )
    assert not base.edits
    assert not base.merged()
    wanted = base.stored(site).double() + left @ right + value.double()
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


def test_an_edit_of_a_strange_site_is_refused(random_folder: Path) -> None:
    base = model.load(str(random_folder))
    site = base.sites[0]
    other = type(site)("unet", "nowhere.weight", site.shape, "cross", "k", "down.0")
    with pytest.raises(ErasecError, match="nowhere"):
        base.with_edit(Edit({other: Dense(torch.zeros(site.shape))}, "me", "x"))


def test_encode_finds_the_last_subject_token(random_folder: Path) -> None:
    tokens = model.load(str(random_folder)).encode(["", "star", "a photo of a star"])
    assert tokens.states.shape == (3, 77, 128)
    assert tokens.last.tolist()[:2] == [0, 1]
    assert tokens.last[2] > tokens.last[1]


def test_digest_is_of_the_content(random_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_folder, copy)
    one, two = model.load(str(random_folder)), model.load(str(copy))
    assert one.digest == two.digest
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(path)[0].items()}
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    checkpoint.save(path, tensors)
    assert model.load(str(copy)).digest != one.digest


def test_an_edit_made_for_another_base_is_refused(random_folder: Path) -> None:
    base = model.load(str(random_folder))
    nothing = Dense(torch.zeros(base.sites[0].shape))
    assert base.with_edit(Edit({base.sites[0]: nothing}, "me", "x", base=base.digest)).digest == base.digest
    with pytest.raises(ErasecError, match="another model"):
        base.with_edit(Edit({base.sites[0]: nothing}, "me", "x", base="0" * 64))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("glyph", "did you mean 'glyphs'"),
        ("./nowhere", "a diffusers folder that exists"),
        ("model.ckpt", "run code"),
        ("model.safetensors", "save_pretrained"),
    ],
)
def test_an_unknown_name_says_what_to_give(name: str, words: str) -> None:
    with pytest.raises(ErasecError) as caught:
        model.load(name)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sdxl", "someone/some-model"])
def test_a_hub_model_without_network_says_how_to_give_a_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ErasecError, match="could not be fetched") as caught:
        model.load(name)
    assert "diffusers folder" in caught.value.fix
    assert "hf download" in caught.value.fix


def test_an_unknown_layout_stops() -> None:
    with pytest.raises(ErasecError, match="no family"):
        detect({"blocks.0.attn.to_k.weight": (8, 8)})


def test_families_by_shape() -> None:
    entry, context = "down_blocks.0.attentions.0.proj_in.weight", "mid_block.attn2.to_k.weight"
    sd1 = {"conv_in.weight": (4, 4, 3, 3), entry: (320, 320, 1, 1), context: (320, 768)}
    sd2 = {**sd1, entry: (320, 320)}
    assert detect(sd1).name == "sd1"
    assert detect(sd2).name == "sd2"
    assert detect({**sd2, "add_embedding.linear_1.weight": (1280, 2816)}).name == "sdxl"


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no diffusers folder"):
        model.load(str(tmp_path))
