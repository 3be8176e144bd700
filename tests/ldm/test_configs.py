"""Config tables: they write the published configs, and refuse sizes that fit no family."""

from __future__ import annotations

from typing import Any

import pytest
from random_models import random_shapes

from erasec.errors import ErasecError
from erasec.ldm.configs import LAYOUTS, config_files, sizes_from_shapes
from erasec.ldm.tensor_names import canonical

SD = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "in_channels": 4,
    "out_channels": 4,
}
FOUR = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
# Copied by hand from the published config.json files.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd1": {**SD, **FOUR, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "sd2": {
        **SD,
        **FOUR,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        **SD,
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "use_linear_projection": True,
        "upcast_attention": False,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "projection_dim")
PUBLISHED_TEXT = {
    ("sd1", "text_encoder"): (768, 12, 12, 3072, "quick_gelu", 768),
    ("sd2", "text_encoder"): (1024, 23, 16, 4096, "gelu", 512),
    ("sdxl", "text_encoder"): (768, 12, 12, 3072, "quick_gelu", 768),
    ("sdxl", "text_encoder_2"): (1280, 32, 20, 5120, "gelu", 1280),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_full_unet_is_as_published(family: str) -> None:
    config = config_files(family, LAYOUTS[family].sizes["full"])["unet/config.json"]
    assert {key: value for key, value in config.items() if key[0] != "_"} == PUBLISHED[family]


@pytest.mark.parametrize(("family", "component"), PUBLISHED_TEXT)
def test_the_full_text_encoders_are_as_published(family: str, component: str) -> None:
    config = config_files(family, LAYOUTS[family].sizes["full"])[f"{component}/config.json"]
    assert tuple(config[key] for key in TEXT) == PUBLISHED_TEXT[family, component]
    assert (config["vocab_size"], config["max_position_embeddings"]) == (49408, 77)


@pytest.mark.parametrize(
    ("family", "scheduler", "prediction", "scaling"),
    [
        ("sd1", "PNDMScheduler", "epsilon", 0.18215),
        ("sd2", "DDIMScheduler", "v_prediction", 0.18215),
        ("sdxl", "EulerDiscreteScheduler", "epsilon", 0.13025),
    ],
)
def test_schedulers_and_scaling_are_as_published(family: str, scheduler: str, prediction: str, scaling: float) -> None:
    files = config_files(family, LAYOUTS[family].sizes["full"])
    config = files["scheduler/scheduler_config.json"]
    assert (config["_class_name"], config["prediction_type"]) == (scheduler, prediction)
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert config["steps_offset"] == 1
    assert files["vae/config.json"]["scaling_factor"] == scaling
    assert files["model_index.json"]["scheduler"] == ["diffusers", scheduler]


def test_sd2_base_is_named_by_its_prediction() -> None:
    files = config_files("sd2", LAYOUTS["sd2"].sizes["full"], "epsilon")
    assert files["scheduler/scheduler_config.json"]["_class_name"] == "PNDMScheduler"
    assert files["scheduler/scheduler_config.json"]["prediction_type"] == "epsilon"
    assert files["unet/config.json"]["sample_size"] == 64


def test_old_tensor_names_become_present_ones_and_back() -> None:
    attention = "decoder.mid_block.attentions.0."
    assert canonical("vae", f"{attention}proj_attn.weight") == f"{attention}to_out.0.weight"
    assert canonical("vae", "decoder.key.weight") == "decoder.key.weight"
    assert canonical("unet", "down_blocks.0.attentions.0.key.weight") == "down_blocks.0.attentions.0.key.weight"
    layer = "encoder.layers.0.mlp.fc1.bias"
    assert canonical("text_encoder", layer) == canonical("text_encoder", f"text_model.{layer}") == f"text_model.{layer}"
    older = random_shapes("sd1", "tiny")["vae"]
    assert {f"{attention}{name}.weight" for name in ("query", "key", "value", "proj_attn")} <= older.keys()
    assert not [key for key in older if ".to_" in key]


def test_unknown_families_and_missing_components_are_errors() -> None:
    with pytest.raises(ErasecError, match="no layout for the family 'sd3'"):
        sizes_from_shapes("sd3", {})
    with pytest.raises(ErasecError, match="no tensors of text_encoder, unet, vae"):
        sizes_from_shapes("sd1", {})
