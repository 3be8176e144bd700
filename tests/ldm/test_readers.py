"""What readers of a single file rebuild: published models and their fine-tunes pass, other settings are refused."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from random_models import random_shapes

from erasec.checkpoint.folder import Folder
from erasec.errors import ErasecError
from erasec.family import FAMILIES
from erasec.ldm import readers
from erasec.ldm.configs import LAYOUTS, default_prediction
from erasec.ldm.readers import check_readers
from erasec.ldm.skeleton import write_skeleton
from erasec.model.loading import bundled_folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs and tokenizers of the published model of each family, without weights."""
    root = tmp_path_factory.mktemp("published")
    for family in LAYOUTS:
        write_skeleton(root / family, family, random_shapes(family, "full"))
    return root


def check(folder: Path, family: str, prediction: str = "", rescaled: bool = False, **shapes: Any) -> tuple[str, ...]:
    """``check_readers`` of a folder with the published shapes, some of which are replaced."""
    sizes = LAYOUTS[family].sizes["full"]
    own = random_shapes(family, "full") | shapes
    return check_readers(Folder(folder), family, own, prediction or default_prediction(family, sizes), rescaled)


def changed(folder: Path, out: Path, file: str, **settings: object) -> Path:
    """A copy of a folder without weights, with other values in one of its JSON files."""
    shutil.copytree(folder, out)
    content = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**content, **settings}))
    return out


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_published_models_lose_nothing(published: Path, family: str) -> None:
    assert check(published / family, family) == ()


def test_defaults_are_those_of_the_libraries() -> None:
    import diffusers
    from transformers import CLIPTextConfig

    for table, name in ((readers.UNET, "UNet2DConditionModel"), (readers.VAE, "AutoencoderKL")):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        defaults = {key: value.default for key, value in parameters.items() if key not in ("self", "dropout")}
        assert table == defaults
    text = CLIPTextConfig()
    assert {field: getattr(text, field) for field in readers.TEXT} == readers.TEXT
    for name in ("PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert {field: parameters[field].default for field in readers.NOISE_DEFAULTS} == readers.NOISE_DEFAULTS


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("family", "file", "settings", "words"),
    [
        ("sd1", "vae/config.json", {"scaling_factor": 0.13025}, "vae scaling_factor is 0.13025 and readers take 0.182"),
        ("sd1", "vae/config.json", {"shift_factor": 0.1}, "vae shift_factor is 0.1 and readers take null"),
        ("sdxl", "vae/config.json", {"latents_mean": [0.0, 1.0, 0.0, 0.0]}, "vae latents_mean is"),
        ("sd1", "text_encoder/config.json", {"num_attention_heads": 8}, "num_attention_heads is 8 and readers take 12"),
        ("sd1", "text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is gelu and readers take quick_gelu"),
        ("sdxl", "text_encoder_2/config.json", {"layer_norm_eps": 1e-6}, "text_encoder_2 layer_norm_eps"),
        ("sd1", "unet/config.json", {"attention_head_dim": 4}, "attention_head_dim is 4 and readers take 8"),
        ("sd1", "unet/config.json", {"norm_num_groups": 16}, "unet norm_num_groups is 16 and readers take 32"),
        ("sd1", SCHEDULER, {"beta_end": 0.02}, "scheduler beta_end is 0.02 and readers take 0.012"),
        ("sd1", SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true and readers take false"),
        ("sd1", SCHEDULER, {"trained_betas": [0.1]}, "scheduler trained_betas is"),
        ("sd1", "tokenizer/tokenizer_config.json", {"model_max_length": 64}, "tokenizer model_max_length is 64"),
        ("sdxl", "tokenizer_2/special_tokens_map.json", {"pad_token": {"content": "x"}}, "tokenizer_2 pad_token is x"),
        ("sd1", "tokenizer/added_tokens.json", {"<cat>": 49408}, "49409 tokens, 1 of them not CLIP's"),
        ("sd1", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae class is AutoencoderTiny"),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt is false"),
    ],
)
def test_what_changes_pictures_is_refused(
    published: Path, tmp_path: Path, family: str, file: str, settings: dict[str, Any], words: str
) -> None:
    (published / family / "tokenizer" / "added_tokens.json").write_text("{}")
    folder = changed(published / family, tmp_path / "model", file, **settings)
    with pytest.raises(ErasecError) as caught:
        check(folder, family)
    assert words in caught.value.what
    assert "use the target hf" in caught.value.fix


@pytest.mark.parametrize(
    ("family", "file", "settings"),
    [
        ("sd1", "unet/config.json", {"attention_head_dim": [8, 8, 8, 8], "mid_block_only_cross_attention": None}),
        ("sd1", "text_encoder/config.json", {"eos_token_id": 49407, "projection_dim": 512, "torch_dtype": "float16"}),
        ("sd1", "vae/config.json", {"_name_or_path": "x", "latents_mean": None}),
        ("sd1", "model_index.json", {"tokenizer": ["transformers", "CLIPTokenizerFast"]}),
        ("sd1", SCHEDULER, {"timestep_spacing": "trailing"}),
    ],
)
def test_other_words_for_the_same_are_no_difference(
    published: Path, tmp_path: Path, family: str, file: str, settings: dict[str, Any]
) -> None:
    assert check(changed(published / family, tmp_path / "model", file, **settings), family) == ()


def test_metadata_are_noted(published: Path, tmp_path: Path) -> None:
    folder = changed(published / "sd2", tmp_path / "one", "unet/config.json", sample_size=64, upcast_attention=False)
    folder = changed(folder, tmp_path / "two", SCHEDULER, _class_name="PNDMScheduler")
    (note,) = check(folder, "sd2")
    for words in ("unet sample_size is 64 and readers take 96", "upcast_attention", "class is PNDMScheduler"):
        assert words in note


def test_a_prediction_that_diffusers_does_not_read_is_noted(published: Path, tmp_path: Path) -> None:
    folder = changed(published / "sdxl", tmp_path / "v", SCHEDULER, prediction_type="v_prediction")
    (note,) = check(folder, "sdxl", "v_prediction")
    assert "diffusers does not read this" in note
    folder = changed(folder, tmp_path / "rescaled", SCHEDULER, rescale_betas_zero_snr=True)
    assert check(folder, "sdxl", "v_prediction", rescaled=True) == (note,)
    with pytest.raises(ErasecError, match="rescale_betas_zero_snr is true"):
        check(folder, "sdxl", "v_prediction")


@pytest.mark.parametrize(
    ("key", "rows", "words"),
    [
        ("token_embedding", 49409, "text_encoder vocab_size is 49409 and readers take 49408"),
        ("position_embedding", 248, "text_encoder max_position_embeddings is 248 and readers take 77"),
    ],
)
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_another_vocabulary_or_length_of_prompts_is_refused(
    published: Path, tmp_path: Path, size: str, key: str, rows: int, words: str
) -> None:
    shapes = random_shapes("sd1", size)
    folder = published / "sd1"
    if size == "tiny":
        folder = tmp_path / "tiny"
        write_skeleton(folder, "sd1", shapes)
    key = f"text_model.embeddings.{key}.weight"
    shapes["text_encoder"][key] = (rows, shapes["text_encoder"][key][1])
    with pytest.raises(ErasecError, match=words):
        check_readers(Folder(folder), "sd1", shapes, "epsilon", False)
    with pytest.raises(ErasecError, match=f"knows {rows} "):  # erasec's own reader
        write_skeleton(tmp_path / "again", "sd1", shapes)


def test_a_model_that_no_reader_has_configs_for_is_noted() -> None:
    """The toy's sizes and vocabulary are its own: readers refuse its file, and none rebuilds it wrongly."""
    folder = Folder(bundled_folder("glyphs"))
    shapes = {
        name: {key: entry.shape for key, entry in folder.entries(name).items()} for name in FAMILIES["sd1"].components
    }
    (note,) = check_readers(folder, "sd1", shapes, "epsilon", False)
    assert "only a reader that is given its configs" in note and "config=FOLDER" in note


def test_other_sizes_with_clips_vocabulary_are_held_to_what_erasec_reads(tmp_path: Path) -> None:
    shapes = random_shapes("sd1", "tiny")
    write_skeleton(tmp_path / "model", "sd1", shapes)
    (note,) = check_readers(Folder(tmp_path / "model"), "sd1", shapes, "epsilon", False)
    assert "has not the sizes of Stable Diffusion 1" in note
    folder = changed(tmp_path / "model", tmp_path / "other", "vae/config.json", scaling_factor=0.5)
    with pytest.raises(ErasecError, match=r"vae scaling_factor is 0\.5"):
        check_readers(Folder(folder), "sd1", shapes, "epsilon", False)
