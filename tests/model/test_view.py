"""Models: found by name, folder or hub id; read lazily; never changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import CARRIED
from erasec.errors import ErasecError
from erasec.family import detect
from erasec.model import sidecar as extras
from erasec.model import view as model
from erasec.model.edit import Dense, Edit, LowRank, merge


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
        ("model.ckpt", "there is no file model.ckpt"),
        ("model.safetensors", "there is no file model.safetensors"),
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


def test_what_a_checkpoint_carries_comes_from_the_hub_with_it(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = Path(shutil.copytree(random_folder, tmp_path / "shared"))
    extras.write(shared, extras.Extras(negative="a star"))
    (shared / "thesis.pdf").write_text("not of the model")

    def fetched(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str], **more: object) -> str:
        names = [path.relative_to(shared).as_posix() for path in shared.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in wanted:
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shared / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    found = model.load("someone/some-model")
    assert extras.read(found.source.root).negative == "a star"
    assert found.digest == model.load(str(shared)).digest
    assert (found.source.root / CARRIED).is_file() and not (found.source.root / "thesis.pdf").exists()


def test_an_unknown_layout_stops() -> None:
    with pytest.raises(ErasecError, match="no family"):
        detect({"blocks.0.attn.to_k.weight": (8, 8)})


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no diffusers folder"):
        model.load(str(tmp_path))


def test_a_pickle_is_refused_and_with_leave_read_as_tensors_alone(random_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(random_folder, tmp_path / "pickled")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = pickled / part / f"{name}.safetensors"
        tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
        torch.save(tensors, file.with_name(f"{name.replace('model', 'pytorch_model') if part != 'unet' else name}.bin"))
        file.unlink()
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        model.load(str(pickled))
    assert "--allow-pickle" in caught.value.fix
    assert model.load(str(pickled), allow_pickle=True).digest == model.load(str(random_folder)).digest


def test_a_single_pickled_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    with pytest.raises(ErasecError, match="pickled") as caught:
        model.load(str(tmp_path / "model.ckpt"))
    assert "--allow-pickle" in caught.value.fix


def test_a_variant_is_taken_where_it_is_asked_for(random_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    for file in copy.glob("*/*.safetensors"):
        tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
        checkpoint.save(file.with_suffix(".bf16.safetensors"), {k: v.bfloat16() for k, v in tensors.items()})
    site = model.load(str(copy)).sites[0]
    assert model.load(str(copy)).stored(site).dtype == torch.float16
    assert model.load(str(copy), variant="bf16").stored(site).dtype == torch.bfloat16
    with pytest.raises(ErasecError, match="no component has the variant 'fp8'"):
        model.load(str(copy), variant="fp8")


def test_flags_that_mean_nothing_are_refused(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in ("glyphs", str(random_folder), str(tmp_path / "model.safetensors")):
        with pytest.raises(ErasecError, match="has no revision 'main'"):
            model.load(name, revision="main")
    for name in ("glyphs", str(tmp_path / "model.safetensors")):
        with pytest.raises(ErasecError, match="has no variant 'fp16'"):
            model.load(name, variant="fp16")


@pytest.mark.parametrize(("part", "file"), [("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json")])
def test_a_folder_without_its_small_files_is_not_whole(
    random_folder: Path, tmp_path: Path, part: str, file: str
) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    assert model.load(str(copy)).sites
    shutil.rmtree(copy / part)
    with pytest.raises(ErasecError, match="not whole") as caught:
        model.load(str(copy))
    assert f"{part}/{file}" in caught.value.why


def hub(monkeypatch: pytest.MonkeyPatch, cached: Path, fetched: Path) -> list[bool]:
    """A hub that has one folder in its cache and gives another one over the network; the list says which were asked."""
    asked: list[bool] = []

    def download(repository: str, local_files_only: bool, **other: object) -> str:
        asked.append(local_files_only)
        return str(cached if local_files_only else fetched)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def with_fp16(folder: Path, out: Path, plain: tuple[str, ...] = ()) -> Path:
    """A copy with weights as the variant fp16 alone, but for the components in ``plain``."""
    shutil.copytree(folder, out)
    for file in out.glob("*/*.safetensors"):
        if file.parent.name not in plain:
            file.rename(file.with_suffix(".fp16.safetensors"))
    return out


def test_what_the_cache_happens_to_hold_does_not_choose_the_precision(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, mixed = with_fp16(random_folder, tmp_path / "half"), with_fp16(random_folder, tmp_path / "mixed", ("vae",))
    assert model.load(str(half)).source.variant_of("unet") == "fp16"  # a folder of one's own has but these

    asked = hub(monkeypatch, half, random_folder)
    assert model.load("owner/model").source.root == random_folder
    assert asked == [True, False]
    asked = hub(monkeypatch, random_folder, half)
    assert model.load("owner/model").source.root == random_folder
    assert asked == [True]
    hub(monkeypatch, half, half)
    with pytest.raises(ErasecError, match="no plain weights of text_encoder") as caught:
        model.load("owner/model")
    assert "--variant fp16" in caught.value.fix

    asked = hub(monkeypatch, mixed, half)
    assert model.load("owner/model", variant="fp16").source.root == half
    assert asked == [True, False]
    hub(monkeypatch, mixed, mixed)
    assert model.load("owner/model", variant="fp16").source.variant_of("vae") == ""


def test_a_cache_without_the_small_files_is_no_reason_to_stop(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = shutil.copytree(random_folder, tmp_path / "partial")
    shutil.rmtree(partial / "tokenizer")
    asked = hub(monkeypatch, partial, random_folder)
    assert model.load("owner/model").source.root == random_folder
    assert asked == [True, False]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ErasecError, match="not whole"):
        model.load("owner/model")


def test_the_same_weights_under_other_keys_have_another_digest(random_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
    start = "text_model."
    renamed = {
        key.removeprefix(start) if key.startswith(start) else start + key: value for key, value in tensors.items()
    }
    checkpoint.save(file, renamed)
    one, two = model.load(str(random_folder)), model.load(str(copy))
    assert one.component_digest("unet") == two.component_digest("unet")
    assert one.component_digest("text_encoder") != two.component_digest("text_encoder")
    assert one.digest != two.digest
