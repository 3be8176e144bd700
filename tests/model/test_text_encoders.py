"""Text states: the same as those of the families' own pipelines, from the same folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import random_models
import torch

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.ldm.skeleton import LAYOUTS
from erasec.model import loading, text_encoders
from erasec.model.edit import Edit
from erasec.model.text_encoders import TextEncoders

PROMPTS = ["", "a star", "a photo of a pentagram on navy, " * 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder with random weights for each of the UNet families."""
    out = tmp_path_factory.mktemp("families")
    for family in LAYOUTS:
        random_models.random_folder(out / family, family)
    return out


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_states_are_those_of_the_pipeline(family: str, folders: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders / family)
    wanted = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    tokens = loading.load(str(folders / family)).encode(PROMPTS)
    assert tokens.states.dtype == torch.float32
    assert torch.allclose(tokens.states, wanted, atol=1e-5)
    assert not torch.allclose(tokens.states[:2], tokens.states[1:], atol=1e-2)


def test_layers_are_the_familys_own(folders: Path) -> None:
    """The last and the penultimate states differ, so the comparison above can tell them apart."""
    texts = TextEncoders(Folder(folders / "sdxl"))
    penultimate = texts.encode(PROMPTS, FAMILIES["sdxl"].streams[0], 96).states[..., :32]
    last = texts.encode(PROMPTS, FAMILIES["sd1"].streams[0], 32).states
    assert penultimate.shape == last.shape
    assert not torch.allclose(penultimate, last, atol=1e-2)


def test_last_tokens_are_token_indices_and_not_word_counts(folders: Path) -> None:
    base = loading.load(str(folders / "sd1"))
    prompts = ["", "a star", "a pentagram of stars", "star " * 200]
    ids = base._text_encoders.ids(prompts, "text_encoder")
    last = base.last_tokens(prompts)
    assert last.tolist()[:2] == [0, 2]
    assert last[3] == 75
    for row, place in enumerate(last.tolist()):
        assert ids[row, place] != 49407
        assert ids[row, place + 1] == 49407
    assert torch.equal(base.encode(prompts).last, last)


def test_batches_do_not_matter(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, stream = TextEncoders(Folder(folders / "sd1")), FAMILIES["sd1"].streams[0]
    whole = texts.encode(PROMPTS, stream, 64).states
    monkeypatch.setattr(text_encoders, "BATCH", 1)
    assert torch.allclose(texts.encode(PROMPTS, stream, 64).states, whole, atol=1e-6)


def test_released_encoders_are_loaded_again(folders: Path) -> None:
    base = loading.load(str(folders / "sdxl"))
    before = base.encode(PROMPTS).states
    view = base.with_edit(Edit({}, "nobody", ("nothing",), ""))
    view.release_text_encoders()
    assert not base._text_encoders._encoders
    assert torch.equal(base.encode(PROMPTS).states, before)


def test_states_of_another_width_are_refused(folders: Path) -> None:
    texts = TextEncoders(Folder(folders / "sd1"))
    for width in (32, 128):
        with pytest.raises(ErasecError, match=f"{width} wide, those of text_encoder are 64") as caught:
            texts.encode(["a star"], FAMILIES["sd1"].streams[0], width)
        assert "not of one model" in caught.value.why


def copied(folder: Path, out: Path) -> Path:
    shutil.copytree(folder / "text_encoder", out / "text_encoder")
    return out


def test_an_unknown_encoder_is_refused(folders: Path, tmp_path: Path) -> None:
    path = copied(folders / "sd1", tmp_path) / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertModel"]}))
    with pytest.raises(ErasecError, match="text_encoder is a BertModel") as caught:
        TextEncoders(Folder(tmp_path)).encoder("text_encoder")
    assert "CLIPTextModel, " in caught.value.why


def test_an_encoder_without_one_of_its_tensors_is_refused(folders: Path, tmp_path: Path) -> None:
    path = copied(folders / "sd1", tmp_path) / "text_encoder" / "model.safetensors"
    tensors = {key: read_tensor(entry) for key, entry in read_header(path)[0].items()}
    gone = next(key for key in tensors if key.endswith("final_layer_norm.bias"))
    save_tensors(path, {key: tensor for key, tensor in tensors.items() if key != gone})
    with pytest.raises(ErasecError, match=r"text_encoder has no tensor .*final_layer_norm\.bias"):
        TextEncoders(Folder(tmp_path)).encoder("text_encoder")


def test_tokenizers_have_their_merges_and_a_limit_and_tokens_have_rows(folders: Path, tmp_path: Path) -> None:
    """transformers reads a tokenizer without merges as one without any, and gives each letter a token."""
    copy = shutil.copytree(folders / "sd1", tmp_path / "copy")
    wanted = loading.load(str(copy)).encode(PROMPTS).states
    settings = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert torch.equal(loading.load(str(copy)).encode(PROMPTS).states, wanted)
    (copy / "tokenizer" / "added_tokens.json").write_text('{"<new>": 49408}')
    model = loading.load(str(copy))
    assert torch.equal(model.encode(PROMPTS).states, wanted)
    with pytest.raises(ErasecError, match="the token '<new>' has no row in the text encoder"):
        model.encode(["a <new> star"])
    (copy / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ErasecError, match=r"merges\.txt cannot be read"):
        loading.load(str(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "swishy"}, "text_encoder cannot be made from its files"),
        ({"num_attention_heads": 7}, "text_encoder cannot be made from its files"),
        ({"intermediate_size": 1024}, "text_encoder and its config do not fit together"),
        ({"num_hidden_layers": 10**9}, "text_encoder/config.json cannot be read"),
    ],
)
def test_a_config_of_another_model_is_an_error(
    folders: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    copy = shutil.copytree(folders / "sd1", tmp_path / "copy")
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ErasecError, match=words):
        loading.load(str(copy)).encode(["a star"])
