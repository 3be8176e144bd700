"""Opening models by name, folder, single file or hub id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import EXTRAS_FILE
from erasec.errors import ErasecError
from erasec.family import detect
from erasec.model import loading
from erasec.model import sidecar as extras
from erasec.model.text_encoders import ENCODERS
from erasec.recipe.presets import read_presets


def test_the_family_of_a_folder_is_detected(random_folder: Path) -> None:
    model = loading.load(str(random_folder))
    assert model.family.name == "sd1"
    assert len(model.sites) == 56
    assert {site.attn for site in model.sites} == {"self", "cross"}
    assert len(model.select("cross", "kv")) == 14
    assert all(site.shape[1] == 128 for site in model.select("cross", "kv"))


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
        loading.load(name)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sdxl", "someone/some-model"])
def test_a_hub_model_without_network_says_how_to_give_a_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ErasecError, match="could not be fetched") as caught:
        loading.load(name)
    assert "diffusers folder" in caught.value.fix
    assert "hf download" in caught.value.fix


def test_extras_and_presets_are_fetched_from_the_hub(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = Path(shutil.copytree(random_folder, tmp_path / "shared"))
    extras.write_extras(shared, extras.Extras(negative="a star"))
    (shared / "presets.toml").write_text("[uce]\nscale = 0.5\n")
    (shared / "thesis.pdf").write_text("not of the model")

    def fetched(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str], **more: object) -> str:
        names = [path.relative_to(shared).as_posix() for path in shared.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in wanted:
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shared / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    model = loading.load("someone/some-model")
    assert extras.read_extras(model.source.root).negative == "a star"
    assert read_presets(model.source.root).of("uce", None) == [{"scale": 0.5}]
    assert model.digest == loading.load(str(shared)).digest
    assert (model.source.root / EXTRAS_FILE).is_file() and not (model.source.root / "thesis.pdf").exists()


def test_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(ErasecError, match="no family"):
        detect({"blocks.0.attn.to_k.weight": (8, 8)})


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no diffusers folder"):
        loading.load(str(tmp_path))


def test_pickles_are_refused_and_with_permission_only_tensors_are_read(random_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(random_folder, tmp_path / "pickled")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = pickled / part / f"{name}.safetensors"
        tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
        torch.save(tensors, file.with_name(f"{name.replace('model', 'pytorch_model') if part != 'unet' else name}.bin"))
        file.unlink()
    with pytest.raises(ErasecError, match="no safetensors weights") as caught:
        loading.load(str(pickled))
    assert "--allow-pickle" in caught.value.fix
    assert loading.load(str(pickled), allow_pickle=True).digest == loading.load(str(random_folder)).digest


def test_a_single_pickled_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    with pytest.raises(ErasecError, match="pickled") as caught:
        loading.load(str(tmp_path / "model.ckpt"))
    assert "--allow-pickle" in caught.value.fix


def test_quantised_models_are_recognised_and_refused(random_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"  # whatever its name
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ErasecError, match=r"the GGUF file .* holds quantised weights") as caught:
        loading.load(str(file))
    assert "float16" in caught.value.fix
    copy = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    loading.load(str(copy))
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ErasecError, match=r"text_encoder of .* holds quantised weights"):
        loading.load(str(copy))


def test_a_variant_is_chosen_by_its_name(random_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    for file in copy.glob("*/*.safetensors"):
        tensors = {key: checkpoint.read_tensor(entry) for key, entry in checkpoint.read_header(file)[0].items()}
        checkpoint.save_tensors(file.with_suffix(".bf16.safetensors"), {k: v.bfloat16() for k, v in tensors.items()})
    site = loading.load(str(copy)).sites[0]
    assert loading.load(str(copy)).stored_weight(site).dtype == torch.float16
    assert loading.load(str(copy), variant="bf16").stored_weight(site).dtype == torch.bfloat16
    with pytest.raises(ErasecError, match="no component has the variant 'fp8'"):
        loading.load(str(copy), variant="fp8")


def test_flags_without_a_meaning_for_the_model_are_refused(random_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in ("glyphs", str(random_folder), str(tmp_path / "model.safetensors")):
        with pytest.raises(ErasecError, match="has no revision 'main'"):
            loading.load(name, revision="main")
    for name in ("glyphs", str(tmp_path / "model.safetensors")):
        with pytest.raises(ErasecError, match="has no variant 'fp16'"):
            loading.load(name, variant="fp16")


@pytest.mark.parametrize(("part", "file"), [("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json")])
def test_a_folder_without_its_small_files_is_incomplete(
    random_folder: Path, tmp_path: Path, part: str, file: str
) -> None:
    copy = shutil.copytree(random_folder, tmp_path / "copy")
    assert loading.load(str(copy)).sites
    shutil.rmtree(copy / part)
    with pytest.raises(ErasecError, match="is incomplete") as caught:
        loading.load(str(copy))
    assert f"{part}/{file}" in caught.value.why


def test_a_tokenizer_of_another_class_is_named(random_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    for name, known in (("CLIPTokenizerFast", True), ("BertTokenizer", False)):
        (copy / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", name]}))
        if known:
            assert loading.load(str(copy)).sites
            continue
        with pytest.raises(ErasecError, match="tokenizer is a BertTokenizer") as caught:
            loading.load(str(copy))
        assert "CLIPTokenizer and T5Tokenizer" in caught.value.why
    assert loading.TOKENIZERS.keys() == set(ENCODERS.values())


def hub(monkeypatch: pytest.MonkeyPatch, cached: Path, fetched: Path) -> list[bool]:
    """A hub with one folder in its cache and another one on the network. The list has an entry for each call: whether
    it was for local files only."""
    local_calls: list[bool] = []

    def download(repository: str, local_files_only: bool, **other: object) -> str:
        local_calls.append(local_files_only)
        return str(cached if local_files_only else fetched)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("erasec.model.hub._ask", lambda repository, revision: None)
    return local_calls


def with_fp16(folder: Path, out: Path, plain: tuple[str, ...] = ()) -> Path:
    """A copy that has its weights only as the variant fp16, except for the components in ``plain``."""
    shutil.copytree(folder, out)
    for file in out.glob("*/*.safetensors"):
        if file.parent.name not in plain:
            file.rename(file.with_suffix(".fp16.safetensors"))
    return out


def test_the_content_of_the_cache_does_not_choose_the_precision(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, mixed = with_fp16(random_folder, tmp_path / "half"), with_fp16(random_folder, tmp_path / "mixed", ("vae",))
    assert loading.load(str(half)).source.variant_of("unet") == "fp16"  # a local folder has only these

    local_calls = hub(monkeypatch, half, random_folder)
    assert loading.load("owner/model").source.root == random_folder
    assert local_calls == [True, False]
    local_calls = hub(monkeypatch, random_folder, half)
    assert loading.load("owner/model").source.root == random_folder
    assert local_calls == [True]
    hub(monkeypatch, half, half)
    with pytest.raises(ErasecError, match="no plain weights of text_encoder") as caught:
        loading.load("owner/model")
    assert "--variant fp16" in caught.value.fix

    local_calls = hub(monkeypatch, mixed, half)
    assert loading.load("owner/model", variant="fp16").source.root == half
    assert local_calls == [True, False]
    hub(monkeypatch, mixed, mixed)
    assert loading.load("owner/model", variant="fp16").source.variant_of("vae") == ""


def test_an_incomplete_cache_is_completed_from_the_network(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = shutil.copytree(random_folder, tmp_path / "partial")
    shutil.rmtree(partial / "tokenizer")
    local_calls = hub(monkeypatch, partial, random_folder)
    assert loading.load("owner/model").source.root == random_folder
    assert local_calls == [True, False]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ErasecError, match="is incomplete"):
        loading.load("owner/model")
