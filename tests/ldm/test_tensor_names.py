"""Maps of tensor names: every tensor of a folder has one place in a single file, and both directions agree.

The names are compared with diffusers' own converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_shapes

from erasec.errors import ErasecError
from erasec.family import Shape
from erasec.ldm.tensor_names import (
    LAYOUTS,
    UNUSED_IN_FOLDERS,
    TensorLocation,
    canonical,
    detect_single,
    from_single,
    to_single,
)

FAMILIES = ("sd1", "sd2", "sdxl")
# The published files' tensors by component, without constants and what is left out. OpenCLIP's q, k and v are one.
COUNTS = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 4 + 23 * 12},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 5 + 32 * 12},
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module", params=[(family, size) for family in FAMILIES for size in ("tiny", "full")], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, dict[str, Shape]]]:
    family, size = request.param
    return family, size, full(family) if size == "full" else random_shapes(family, size)


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, Shape]]:
    """Shapes of a tiny single file by family; copy before damaging."""
    return {family: in_file(to_single(family, random_shapes(family, "tiny"))) for family in FAMILIES}


@cache
def full(family: str) -> dict[str, dict[str, Shape]]:
    """Shapes of the published model; not to be changed."""
    return random_shapes(family, "full")


def in_file(places: Mapping[Any, TensorLocation]) -> dict[str, Shape]:
    return {place.key: place.shape for place in places.values()}


def parts(shapes: Mapping[str, Shape], prefix: str) -> dict[str, torch.Tensor]:
    tensors = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    return {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}


def test_there_and_back_is_every_tensor(case: tuple[str, str, dict[str, dict[str, Shape]]]) -> None:
    family, _, shapes = case
    places = to_single(family, shapes)
    wanted = {
        (component, canonical(component, key)): shape
        for component, own in shapes.items()
        for key, shape in own.items()
        if canonical(component, key) not in UNUSED_IN_FOLDERS
    }
    file = in_file(places)
    assert detect_single(file) == family
    back = from_single(family, file)
    assert {name: place.folder_shape for name, place in back.items()} == wanted
    assert {(name[0], canonical(*name)): place for name, place in places.items()} == back
    # The folder's tensors fill the file's tensors completely, and without overlaps.
    assert sum(map(prod, wanted.values())) == sum(map(prod, file.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_file_has_as_many_tensors_as_the_published_one(family: str) -> None:
    file = in_file(to_single(family, full(family)))
    counts = {name: sum(key.startswith(prefix) for key in file) for name, prefix in LAYOUTS[family].prefixes.items()}
    assert counts == COUNTS[family]
    assert sum(counts.values()) == len(file)


def test_diffusers_reads_the_same_names(case: tuple[str, str, dict[str, dict[str, Shape]]]) -> None:
    family, _, shapes = case
    places = to_single(family, shapes)
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
    unet = parts(in_file(places), UNET)
    read = convert_ldm_unet_checkpoint(unet, config)
    assert {key: id(tensor) for key, tensor in read.items()} == {
        key: id(unet[place.key]) for (component, key), place in places.items() if component == "unet"
    }
    vae = convert_ldm_vae_checkpoint(
        parts(in_file(places), VAE), {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    )
    assert {key: tuple(tensor.shape) for key, tensor in vae.items()} == {
        canonical("vae", key): shape for key, shape in shapes["vae"].items()
    }


@pytest.mark.parametrize(
    ("family", "component", "key", "place"),
    [
        (
            "sd1",
            "unet",
            "down_blocks.1.downsamplers.0.conv.bias",
            TensorLocation(UNET + "input_blocks.6.0.op.bias", (640,)),
        ),
        (
            "sd1",
            "unet",
            "up_blocks.0.upsamplers.0.conv.bias",
            TensorLocation(UNET + "output_blocks.2.1.conv.bias", (1280,)),
        ),
        (
            "sd1",
            "unet",
            "up_blocks.2.upsamplers.0.conv.bias",
            TensorLocation(UNET + "output_blocks.8.2.conv.bias", (640,)),
        ),
        (
            "sd1",
            "unet",
            "down_blocks.0.attentions.0.proj_in.weight",
            TensorLocation(UNET + "input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ),
        (
            "sd2",
            "unet",
            "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
            TensorLocation(UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias", (320,)),
        ),
        ("sdxl", "unet", "add_embedding.linear_2.bias", TensorLocation(UNET + "label_emb.0.2.bias", (1280,))),
        (
            "sdxl",
            "unet",
            "mid_block.resnets.1.conv2.bias",
            TensorLocation(UNET + "middle_block.2.out_layers.3.bias", (1280,)),
        ),
        (
            "sd1",
            "vae",
            "encoder.mid_block.attentions.0.query.weight",
            TensorLocation(VAE + "encoder.mid.attn_1.q.weight", (512, 512, 1, 1), linear=True),
        ),
        (
            "sd1",
            "vae",
            "encoder.mid_block.attentions.0.proj_attn.bias",
            TensorLocation(VAE + "encoder.mid.attn_1.proj_out.bias", (512,), linear=False),
        ),
        (
            "sdxl",
            "vae",
            "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
            TensorLocation(VAE + "decoder.up.0.block.0.nin_shortcut.bias", (128,)),
        ),
        (
            "sd2",
            "text_encoder",
            "text_model.encoder.layers.22.self_attn.k_proj.weight",
            TensorLocation(
                "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", (3072, 1024), 1024, 1024
            ),
        ),
        (
            "sd2",
            "text_encoder",
            "text_model.embeddings.position_embedding.weight",
            TensorLocation("cond_stage_model.model.positional_embedding", (77, 1024)),
        ),
        (
            "sdxl",
            "text_encoder_2",
            "text_projection.weight",
            TensorLocation("conditioner.embedders.1.model.text_projection", (1280, 1280), transposed=True),
        ),
    ],
)
def test_known_places(family: str, component: str, key: str, place: TensorLocation) -> None:
    assert to_single(family, full(family))[component, key] == place


@pytest.mark.parametrize("family", FAMILIES)
def test_both_generations_of_names_have_one_place(family: str) -> None:
    shapes = random_shapes(family, "tiny")
    short = {
        name: {key.removeprefix("text_model."): shape for key, shape in own.items()} for name, own in shapes.items()
    }
    new = {name: {canonical(name, key): shape for key, shape in own.items()} for name, own in shapes.items()}
    assert any(key.startswith("embeddings.") for key in short["text_encoder"])
    assert any(key.endswith("attentions.0.to_q.weight") for key in new["vae"])
    assert in_file(to_single(family, short)) == in_file(to_single(family, new)) == in_file(to_single(family, shapes))


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3),
    levels=st.lists(st.tuples(st.sampled_from([32, 64]), st.integers(0, 2)), min_size=1, max_size=4),
    linear=st.booleans(),
)
def test_any_structure_goes_there_and_back(layers: int, levels: list[tuple[int, int]], linear: bool) -> None:
    depths = [depth for _, depth in levels]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=tuple(width for width, _ in levels),
            layers_per_block=layers,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            transformer_layers_per_block=tuple(max(1, depth) for depth in depths),
            use_linear_projection=linear,
            cross_attention_dim=16,
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    family = "sd2" if linear else "sd1"
    places = to_single(family, {"unet": shapes})
    assert {place.folder_shape for place in places.values()} == set(shapes.values())
    assert from_single(family, in_file(places)) == places
    tensors = parts(in_file(places), UNET)
    read = convert_ldm_unet_checkpoint(tensors, unet.config)
    assert {key: id(tensor) for key, tensor in read.items()} == {
        key: id(tensors[place.key]) for (_, key), place in places.items()
    }


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_renamed_key_is_noticed(files: dict[str, dict[str, Shape]], data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    file = dict(files[family])
    before = from_single(family, file)
    key = data.draw(st.sampled_from(sorted(file)))
    file[key.replace("e", "a", 1)] = file.pop(key)
    try:
        after = from_single(family, file)
    except ErasecError:
        return
    assert after.keys() < before.keys()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_text_encoder_without_its_prefix_is_read(files: dict[str, dict[str, Shape]], family: str) -> None:
    places = from_single(family, files[family])
    short = {key.replace("transformer.text_model.", "transformer."): shape for key, shape in files[family].items()}
    more = {
        f"{LAYOUTS[family].prefixes['text_encoder']}{name}": () for name in ("embeddings.position_ids", "logit_scale")
    }
    assert short.keys() != files[family].keys()
    read = from_single(family, short | more)
    assert read.keys() == places.keys()
    assert {place.key for place in read.values()} == short.keys()
    with pytest.raises(ErasecError, match="are the same tensor under two names"):
        from_single(family, files[family] | short)
    with pytest.raises(ErasecError, match="is no tensor of"):
        from_single(family, short | {f"{LAYOUTS[family].prefixes['text_encoder']}encoder.layers.0.mlp.fc3.bias": (4,)})


def test_what_belongs_to_no_component_is_left_out(files: dict[str, dict[str, Shape]]) -> None:
    extra = {
        "alphas_cumprod": (1000,),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
        "global_step": (),
        VAE + "loss.logvar": (),
        "v_pred": (0,),
    }
    clip = "cond_stage_model.transformer."
    more = {
        "sd1": {clip + "text_model.embeddings.position_ids": (1, 77), "cond_stage_model.logit_scale": ()},
        "sd2": {"cond_stage_model.model.logit_scale": ()},
        "sdxl": {"conditioner.embedders.1.model.logit_scale": ()},
    }
    for family, file in files.items():
        assert from_single(family, {**file, **extra, **more[family]}) == from_single(family, file)
        with pytest.raises(ErasecError, match=r"unheard_of is no tensor of"):
            from_single(family, {**file, UNET + "unheard_of": ()})


def test_the_last_layer_of_openclip_in_sd2_is_left_out(files: dict[str, dict[str, Shape]]) -> None:
    prefix = "cond_stage_model.model.transformer.resblocks."
    file = files["sd2"]
    last = {key.replace("resblocks.2.", "resblocks.3."): shape for key, shape in file.items() if "resblocks.2." in key}
    assert len(last) == 12
    whole = {**file, **last, "cond_stage_model.model.text_projection": (64, 64)}
    assert from_single("sd2", whole) == from_single("sd2", file)
    # Without the projection this is a folder's encoder, which ended at its last layer.
    last_layer = from_single("sd2", {**file, **last}).keys() - from_single("sd2", file).keys()
    assert {place.split(".")[3] for _, place in last_layer} == {"3"} and len(last_layer) == 16
    whole = in_file(to_single("sd2", full("sd2")))
    last = {key.replace("blocks.22.", "blocks.23."): shape for key, shape in whole.items() if prefix + "22." in key}
    assert len(last) == 12
    assert from_single("sd2", {**whole, **last}) == from_single("sd2", whole)


def test_a_text_encoder_with_the_last_layer_is_refused() -> None:
    text = full("sd2")["text_encoder"]
    more = {key.replace(".22.", ".23."): shape for key, shape in text.items() if ".layers.22." in key}
    with pytest.raises(ErasecError, match="this text_encoder has 24 layers"):
        to_single("sd2", {"text_encoder": {**text, **more}})
    shapes = random_shapes("sd2", "tiny")
    shapes["text_encoder"]["text_projection.weight"] = (64, 64)
    with pytest.raises(ErasecError, match=r"text_projection\.weight has no place"):
        to_single("sd2", shapes)


def test_two_unets_in_a_file_are_refused(files: dict[str, dict[str, Shape]]) -> None:
    with pytest.raises(ErasecError, match="two UNets") as caught:
        from_single("sd1", {**files["sd1"], "model_ema.diffusion_modelout2bias": (4,)})
    assert "prune it" in caught.value.fix


@pytest.mark.parametrize("missing", ["input_blocks.4.", "output_blocks.0.", "transformer.resblocks.1."])
def test_a_gap_in_the_numbers_of_blocks_is_an_error(files: dict[str, dict[str, Shape]], missing: str) -> None:
    file = {key: shape for key, shape in files["sd2"].items() if missing not in key}
    with pytest.raises(ErasecError, match="have a gap"):
        from_single("sd2", file)


def test_joint_tensors_are_whole_or_refused(files: dict[str, dict[str, Shape]]) -> None:
    shapes = random_shapes("sd2", "tiny")
    del shapes["text_encoder"]["text_model.encoder.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(ErasecError, match=r"a part of .*resblocks\.1\.attn\.in_proj_bias is missing"):
        to_single("sd2", shapes)
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(ErasecError, match="in_proj_bias is"):
        from_single("sd2", {**files["sd2"], key: (191,)})


def test_keys_without_place_and_doubles_are_refused() -> None:
    shapes = random_shapes("sd1", "tiny")
    adapter = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    with pytest.raises(ErasecError, match=r"unet: .*lora_A\.weight has no place in a single file"):
        to_single("sd1", {**shapes, "unet": {**shapes["unet"], adapter: (4, 32)}})
    twice = {**shapes["vae"], "encoder.mid_block.attentions.0.to_q.bias": (64,)}
    with pytest.raises(ErasecError, match="the same tensor under two names"):
        to_single("sd1", {**shapes, "vae": twice})
    with pytest.raises(ErasecError, match="sd1 has no component text_encoder_2"):
        to_single("sd1", {"text_encoder_2": {}})
    with pytest.raises(ErasecError, match="sd9 has no single-file layout"):
        from_single("sd9", {})


@pytest.mark.parametrize(
    ("keys", "guess"),
    [
        (("lora_unet_down_blocks_0.lora_up.weight",), "a LoRA"),
        (("unet.mid_block.attentions.0.to_k.lora_A.weight",), "a LoRA"),
        (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "the UNet alone of a diffusers folder"),
        (("encoder.down_blocks.0.resnets.0.conv1.weight",), "the VAE alone of a diffusers folder"),
        (("encoder.down.0.block.0.conv1.weight",), "a VAE alone"),
        (("text_model.final_layer_norm.bias",), "a text encoder alone"),
        (("model.diffusion_model.double_blocks.0.img_attn.proj.weight",), "a relative of FLUX.1"),
        (("joint_blocks.0.x_block.attn.proj.weight",), "a relative of Stable Diffusion 3"),
        (("conditioner.embedders.0.model.ln_final.bias", UNET + "input_blocks.4.1.proj_in.weight"), "an SDXL refiner"),
        (("something.else",), "it has 1 tensors"),
        ((), "it has 0 tensors"),
    ],
)
def test_the_error_says_what_another_file_looks_like(keys: tuple[str, ...], guess: str) -> None:
    with pytest.raises(ErasecError, match="no single-file checkpoint") as caught:
        detect_single(dict.fromkeys(keys, (4, 4)))
    assert guess in caught.value.why


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_a_component_is_an_error_that_names_it(files: dict[str, dict[str, Shape]], family: str) -> None:
    for name, prefix in LAYOUTS[family].prefixes.items():
        file = {key: shape for key, shape in files[family].items() if not key.startswith(prefix)}
        message = "no single-file checkpoint" if name == "unet" else f"this single file has no {name}$"
        with pytest.raises(ErasecError) as caught:
            detect_single(file)
        assert re.search(message, caught.value.what)
