"""Skeletons and random folders: CLIP's own token ids, pipelines that load, and errors for shapes that fit no config."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_folder, random_shapes

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.family import FAMILIES, Shape, detect
from erasec.ldm.configs import LAYOUTS, config_files, sizes_from_shapes
from erasec.ldm.skeleton import write_skeleton

Changed = dict[str, dict[str, Shape]]

PROMPT = "a photo of an astronaut riding a horse on mars"
IDS = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
FAMILY_SIZES = [(family, size) for family in LAYOUTS for size in ("full", "tiny")]
PARAMETERS = {
    "sd1": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "sd2": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of each family; the UNet of sd2 in three files."""
    out = tmp_path_factory.mktemp("tiny")
    for family in LAYOUTS:
        random_folder(out / family, family, shards=3 if family == "sd2" else 1)
    return out


@functools.cache
def cached_shapes(family: str, size: str) -> Changed:
    return random_shapes(family, size)


def family_shapes(family: str, size: str) -> Changed:
    """A copy of the shapes, which tests may change; they are computed once."""
    return copy.deepcopy(cached_shapes(family, size))


def shapes_of(folder: Folder, family: str) -> dict[str, dict[str, Shape]]:
    return {
        name: {key: entry.shape for key, entry in folder.entries(name).items()} for name in FAMILIES[family].components
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tokenizer_gives_clip_s_ids(tiny: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny / "sd1" / "tokenizer")
    assert tokenizer(PROMPT).input_ids == IDS
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("Café — 2 € 🐎").input_ids != tokenizer("Cafe - 2 e").input_ids
    assert tokenizer.unk_token_id not in tokenizer("Café — 2 € 🐎").input_ids[1:-1]


@pytest.mark.parametrize(
    ("folder", "pad"),
    [("sd1/tokenizer", 49407), ("sd2/tokenizer", 0), ("sdxl/tokenizer", 49407), ("sdxl/tokenizer_2", 0)],
)
def test_padding_is_the_family_s(tiny: Path, folder: str, pad: int) -> None:
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(tiny / folder)(PROMPT, padding="max_length").input_ids
    assert ids == IDS + [pad] * (77 - len(IDS))


@pytest.mark.parametrize("family", LAYOUTS)
def test_diffusers_runs_the_folder(tiny: Path, family: str) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny / family)
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline")
    pipe.set_progress_bar_config(disable=True)
    # A library fills missing tensors with random numbers, so the loaded ones are compared with the files.
    stored = Folder(tiny / family).entries("vae")
    key = "decoder.mid_block.attentions.0."
    old = stored.get(f"{key}proj_attn.weight") or stored[f"{key}to_out.0.weight"]
    assert torch.equal(pipe.vae.state_dict()[f"{key}to_out.0.weight"], checkpoint.read_tensor(old))
    text = Folder(tiny / family).entries("text_encoder")["text_model.encoder.layers.1.mlp.fc2.weight"]
    assert torch.equal(pipe.text_encoder.encoder.layers[1].mlp.fc2.weight, checkpoint.read_tensor(text))
    if family == "sdxl":
        second = Folder(tiny / family).entries("text_encoder_2")["text_projection.weight"]
        assert torch.equal(pipe.text_encoder_2.text_projection.weight, checkpoint.read_tensor(second))
    images = pipe(PROMPT, height=64, width=64, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and bool(torch.isfinite(torch.from_numpy(images)).all())
    assert images.std() > 0


@pytest.mark.parametrize("family", LAYOUTS)
def test_files_hold_the_shapes_of_the_family(tiny: Path, family: str) -> None:
    assert shapes_of(Folder(tiny / family), family) == family_shapes(family, "tiny")
    count = len(Folder(tiny / family).weight_files("unet"))
    assert count == (3 if family == "sd2" else 1)


@pytest.mark.parametrize(("family", "size"), FAMILY_SIZES)
def test_sizes_are_read_back_from_shapes(family: str, size: str) -> None:
    shapes = family_shapes(family, size)
    assert detect(shapes["unet"]).name == family
    assert sizes_from_shapes(family, shapes) == LAYOUTS[family].sizes[size]


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_full_skeleton_has_the_configs_of_the_family(tmp_path: Path, family: str) -> None:
    write_skeleton(tmp_path, family, family_shapes(family, "full"))
    expected = config_files(family, LAYOUTS[family].sizes["full"])
    assert {name: json.loads((tmp_path / name).read_text()) for name in expected} == expected
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("family", LAYOUTS)
def test_full_shapes_have_the_published_numbers_of_parameters(family: str) -> None:
    shapes = family_shapes(family, "full")
    parameters = {
        name: sum(math.prod(shape) for key, shape in tensors.items() if not key.endswith("position_ids"))
        for name, tensors in shapes.items()
    }
    assert parameters == PARAMETERS[family]
    assert all(key.startswith(("text_model.", "text_projection.")) for key in shapes["text_encoder"])


def test_inpainting_has_nine_channels_and_its_own_pipeline(tmp_path: Path) -> None:
    shapes = family_shapes("sd2", "tiny")
    shapes["unet"]["conv_in.weight"] = (32, 9, 3, 3)
    write_skeleton(tmp_path, "sd2", shapes)
    assert json.loads((tmp_path / "unet/config.json").read_text())["in_channels"] == 9
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"


def test_text_encoders_may_come_without_prefix_and_with_more(tmp_path: Path) -> None:
    shapes = family_shapes("sd1", "tiny")
    text = {key.removeprefix("text_model."): shape for key, shape in shapes["text_encoder"].items()}
    write_skeleton(tmp_path, "sd1", {**shapes, "text_encoder": {**text, "logit_scale": ()}})
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["hidden_size"] == 64


EMBEDDING = "text_model.embeddings.token_embedding.weight"
KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shapes: shapes["text_encoder"].update({EMBEDDING: (40, 64)}), "knows 40 tokens, CLIP has 49408"),
        (lambda shapes: shapes["text_encoder"].pop(EMBEDDING), f"text_encoder has no {EMBEDDING}"),
        (lambda shapes: shapes["unet"].update({"conv_in.weight": (32, 8, 3, 3)}), "the UNet takes 8 channels"),
        (lambda shapes: shapes["unet"].update({KEY: (64, 96)}), f"{KEY} is (64, 96), and with that config (64, 64)"),
        (
            lambda shapes: shapes["unet"].update({"extra.weight": (4,)}),
            "extra.weight is (4,), and with that config not",
        ),
        (lambda shapes: shapes["vae"].pop("post_quant_conv.bias"), "post_quant_conv.bias is missing"),
        (lambda shapes: shapes.pop("vae"), "there are no tensors of vae"),
        (lambda shapes: shapes["unet"].update({"down_blocks.0.resnets.0.conv1.weight": (40, 32, 3, 3)}), "no UNet2D"),
        (lambda shapes: shapes["unet"].update({"add_embedding.linear_1.weight": (4, 4)}), "by its shapes it is sdxl"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(tmp_path: Path, change: Callable[[Changed], Any], message: str) -> None:
    shapes = family_shapes("sd1", "tiny")
    change(shapes)
    with pytest.raises(ErasecError) as caught:
        write_skeleton(tmp_path, "sd1", shapes)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_size_embeddings_of_the_refiner_are_refused(tmp_path: Path) -> None:
    shapes = family_shapes("sdxl", "tiny")
    shapes["unet"]["add_embedding.linear_1.weight"] = (128, 5 * 32 + 64)
    with pytest.raises(ErasecError, match="embeds 224 numbers"):
        write_skeleton(tmp_path, "sdxl", shapes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "sd4"}, "no layout for the family 'sd4'"),
        ({"size": "small"}, "no size 'small'"),
        ({"dtype": "float61"}, "not written as float61"),
        ({"seed": -1}, "seed -1 and 1 shards"),
        ({"shards": 0}, "seed 0 and 0 shards"),
    ],
)
def test_wrong_arguments_of_random_folder_are_errors(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasecError, match=message):
        random_folder(tmp_path, **{"family": "sd1", **wrong})
    assert not list(tmp_path.iterdir())


def test_an_unknown_prediction_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="no UNet predicts 'eps'"):
        write_skeleton(tmp_path, "sd1", family_shapes("sd1", "tiny"), "eps")


def test_same_seed_same_bytes_and_another_seed_others(tiny: Path, tmp_path: Path) -> None:
    random_folder(tmp_path / "again", "sd1")
    random_folder(tmp_path / "other", "sd1", seed=1)
    first, again, other = files(tiny / "sd1"), files(tmp_path / "again"), files(tmp_path / "other")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


def test_shards_and_dtype_do_not_change_the_values(tiny: Path, tmp_path: Path) -> None:
    random_folder(tmp_path, "sd1", dtype="bfloat16", shards=2)
    single, sharded = Folder(tiny / "sd1").entries("unet"), Folder(tmp_path).entries("unet")
    assert {entry.file.name for entry in sharded.values()} == {
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    for key, entry in sharded.items():
        assert torch.equal(checkpoint.read_tensor(entry), checkpoint.read_tensor(single[key]).bfloat16()), key
    index = json.loads((tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.stop - entry.start for entry in sharded.values())


def test_weights_are_scaled_by_fan_in_and_norms_are_near_the_identity(tiny: Path) -> None:
    entries = Folder(tiny / "sd1").entries("unet")
    conv = checkpoint.read_tensor(entries["mid_block.resnets.0.conv1.weight"])
    assert conv.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
    norm, bias = (checkpoint.read_tensor(entries[f"conv_norm_out.{name}"]) for name in ("weight", "bias"))
    assert norm.mean().item() == pytest.approx(1, abs=0.02) and 0.01 < norm.std().item() < 0.03
    assert bias.mean().item() == pytest.approx(0, abs=0.02) and 0.01 < bias.std().item() < 0.03


@pytest.mark.slow
def test_full_sd1_in_half_precision_has_the_published_size(tmp_path: Path) -> None:
    random_folder(tmp_path, "sd1", "full", dtype="float16")
    for component, count in PARAMETERS["sd1"].items():
        (file,) = Folder(tmp_path).weight_files(component)
        entries, metadata = checkpoint.read_header(file)
        assert metadata == {"format": "pt"}
        assert list(entries) == sorted(entries, key=lambda name: (entries[name].dtype != "I64", name))
        ids = 77 * 8 if component == "text_encoder" else 0
        header = min(entry.start for entry in entries.values())
        assert file.stat().st_size == header + 2 * count + ids
        assert {entry.dtype for entry in entries.values()} == ({"F16", "I64"} if ids else {"F16"})
