"""Configs of a folder: fields that erasec uses are checked, and no model chooses the code that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint.configs import described_by, read_config, read_index
from erasec.checkpoint.folder import trained_size
from erasec.errors import ErasecError

UNET = {"_class_name": "UNet2DConditionModel", "block_out_channels": [64, 128], "sample_size": 64, "more": [None, "x"]}


def write(folder: Path, content: Any, name: str = "unet/config.json") -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_config_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, UNET), "unet") == UNET
    with pytest.raises(ErasecError, match=r"unet/config\.json cannot be read") as caught:
        read_config(tmp_path, "unet")["in_channels"]
    assert caught.value.why == "it has no 'in_channels'"


def test_a_value_that_is_needed_and_null_is_named(tmp_path: Path) -> None:
    unet = read_config(write(tmp_path, UNET | {"sample_size": None}), "unet")
    assert unet.get("sample_size") is None
    with pytest.raises(ErasecError, match=r"unet/config\.json cannot be read") as caught:
        trained_size(unet)
    assert caught.value.why == "its 'sample_size' is null"


def test_the_size_that_a_unet_was_trained_on_has_one_or_two_numbers(tmp_path: Path) -> None:
    assert trained_size(read_config(write(tmp_path, UNET), "unet")) == (64, 64)
    assert trained_size(read_config(write(tmp_path, UNET | {"sample_size": [48, 80]}), "unet")) == (48, 80)


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": []},
        {"block_out_channels": "64"},
        {"block_out_channels": [0]},
        {"sample_size": "64"},
        {"sample_size": [1, 2, 3]},
        {"in_channels": 2**40},
        {"cross_attention_dim": "768"},
        {"num_hidden_layers": 10**9},
        {"layers_per_block": [[10**9]]},
        {"architectures": []},
        {"scaling_factor": 0},
        {"num_train_timesteps": True},
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ErasecError, match=r"unet/config\.json cannot be read") as caught:
        read_config(write(tmp_path, UNET | change), "unet")
    assert caught.value.why.startswith(next(iter(change)))


INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": [None, None]}


def test_an_index_is_read_as_it_is(tmp_path: Path) -> None:
    content = INDEX | {"safety_checker": ["stable_diffusion", "SafetyChecker"], "requires_safety_checker": True}
    assert read_index(write(tmp_path, content, "model_index.json")) == content


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"unet": ["os", "system"]}, "a model must not choose the code that runs"),
        ({"scheduler": ["evil.diffusers", "X"]}, "a model must not choose the code that runs"),
        ({"unet": []}, "not the names of a library and a class"),
        ({"unet": ["diffusers"]}, "not the names of a library and a class"),
        ({"unet": ["diffusers", 5]}, "not the names of a library and a class"),
        ({"../unet": ["diffusers", "X"]}, "is no name of a component"),
    ],
)
def test_an_index_that_names_something_else_is_refused(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ErasecError, match=r"model_index\.json cannot be read") as caught:
        read_index(write(tmp_path, INDEX | entry, "model_index.json"))
    assert words in caught.value.why


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("swishy"), "'swishy' is missing or not known"),
        (TypeError("X.__init__() got an unexpected keyword"), "a value is of another type or size"),
        (ValueError("heads must divide the width\nmore"), "heads must divide the width"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_a_library_raises_for_a_config_becomes_words(tmp_path: Path, error: Exception, words: str) -> None:
    with (
        pytest.raises(ErasecError, match="unet cannot be made from its files") as caught,
        described_by("unet", tmp_path),
    ):
        raise error
    assert caught.value.why.startswith(words)
