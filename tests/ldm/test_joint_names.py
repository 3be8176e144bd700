"""Maps of the names of sd3 and flux: both directions agree, and diffusers reads the same rows of the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
)

from erasec.errors import ErasecError
from erasec.family import FAMILIES, Shape
from erasec.ldm.joint_readers import reader_check
from erasec.ldm.module_names import FORMS
from erasec.ldm.tensor_names import (
    LAYOUTS,
    PROJECTION,
    TensorLocation,
    canonical,
    detect_single,
    from_single,
    to_single,
)

SD3: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 8,
}
# diffusers reads FLUX at its own width alone. Without memory for the weights, that costs nothing.
FLUX: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2}
TRANSFORMERS = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35-medium": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "sd35-large": ("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm"}),
    "flux-dev": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", FLUX),
}
PREFIX = "model.diffusion_model."


def shapes_of(make: Any) -> dict[str, Shape]:
    """Shapes by tensor name of a network that is made without memory for its weights."""
    with torch.device("meta"):
        network = make()
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


@cache
def transformer(name: str) -> dict[str, Shape]:
    kind, config = TRANSFORMERS[name]
    return shapes_of(lambda: getattr(diffusers, kind)(**config))


def family_of(name: str) -> str:
    return "flux" if name.startswith("flux") else "sd3"


@cache
def others(family: str) -> dict[str, dict[str, Shape]]:
    """Shapes of small text encoders and of a VAE, by component."""

    def clip(projected: bool) -> dict[str, Shape]:
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        sizes = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
        return shapes_of(lambda: kind(transformers.CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)))

    t5 = transformers.T5Config(
        vocab_size=42, d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    vae = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 16}
    kinds = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    encoders = {"text_encoder": clip(family == "sd3")} | ({"text_encoder_2": clip(True)} if family == "sd3" else {})
    return encoders | {
        LAYOUTS[family].t5[0]: shapes_of(lambda: transformers.T5EncoderModel(t5)),
        "vae": shapes_of(
            lambda: diffusers.AutoencoderKL(
                down_block_types=kinds[0],
                up_block_types=kinds[1],
                use_quant_conv=False,
                use_post_quant_conv=False,
                **vae,
            )
        ),
    }


def in_file(places: Mapping[Any, TensorLocation]) -> dict[str, Shape]:
    return {place.key: place.shape for place in places.values()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_there_and_back_is_every_tensor_and_diffusers_reads_the_same_rows(name: str) -> None:
    family, own = family_of(name), transformer(name)
    places = to_single(family, {"transformer": own})
    file = in_file(places)
    assert {key for _, key in places} == own.keys()
    assert detect_single(file) == family
    assert from_single(family, file) == places
    assert all(place.folder_shape == own[key] for (_, key), place in places.items())
    check = reader_check(family, file, places)
    assert check.passed and f"{len(own)} tensors" in check.how


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_prefix_may_be_missing(name: str) -> None:
    family = family_of(name)
    places = to_single(family, {"transformer": transformer(name)})
    bare = {key.removeprefix(PREFIX): shape for key, shape in in_file(places).items()}
    assert detect_single(bare) == family
    read = from_single(family, bare)
    vae = in_file(to_single(family, {"vae": others(family)["vae"]}))
    assert from_single(family, bare | vae).keys() == read.keys() | {("vae", key) for key in others(family)["vae"]}
    assert {name: replace(place, key=PREFIX + place.key) for name, place in read.items()} == places
    assert reader_check(family, bare, read).passed


@pytest.mark.parametrize(
    ("name", "key", "place"),
    [
        (
            "sd35-medium",
            "transformer_blocks.1.attn.add_k_proj.weight",
            TensorLocation(PREFIX + "joint_blocks.1.context_block.attn.qkv.weight", (48, 16), 16, 16),
        ),
        (
            "sd35-medium",
            "transformer_blocks.0.attn2.to_v.bias",
            TensorLocation(PREFIX + "joint_blocks.0.x_block.attn2.qkv.bias", (48,), 32, 16),
        ),
        (
            "sd35-large",
            "transformer_blocks.2.norm1_context.linear.weight",
            TensorLocation(PREFIX + "joint_blocks.2.context_block.adaLN_modulation.1.weight", (32, 16), swapped=True),
        ),
        (
            "sd35-large",
            "transformer_blocks.1.norm1_context.linear.weight",
            TensorLocation(PREFIX + "joint_blocks.1.context_block.adaLN_modulation.1.weight", (96, 16)),
        ),
        ("sd3", "pos_embed.pos_embed", TensorLocation(PREFIX + "pos_embed", (1, 64, 16))),
        (
            "flux-dev",
            "single_transformer_blocks.1.proj_mlp.bias",
            TensorLocation(PREFIX + "single_blocks.1.linear1.bias", (21504,), 9216, 12288),
        ),
        (
            "flux-dev",
            "transformer_blocks.0.attn.norm_added_q.weight",
            TensorLocation(PREFIX + "double_blocks.0.txt_attn.norm.query_norm.scale", (128,)),
        ),
        (
            "flux-dev",
            "time_text_embed.guidance_embedder.linear_2.bias",
            TensorLocation(PREFIX + "guidance_in.out_layer.bias", (3072,)),
        ),
        (
            "flux-schnell",
            "norm_out.linear.bias",
            TensorLocation(PREFIX + "final_layer.adaLN_modulation.1.bias", (6144,), swapped=True),
        ),
    ],
)
def test_known_places(name: str, key: str, place: TensorLocation) -> None:
    assert to_single(family_of(name), {"transformer": transformer(name)})["transformer", key] == place


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_check_of_diffusers_finds_other_rows(name: str) -> None:
    """Halves that are not swapped, parts of a joint tensor that changed places, and a name that is another one's."""
    family = family_of(name)
    places = to_single(family, {"transformer": transformer(name)})
    file = in_file(places)
    out = ("transformer", "norm_out.linear.weight")
    q, k = (("transformer", f"transformer_blocks.1.attn.add_{part}_proj.weight") for part in "qk")
    norm = [("transformer", f"time_text_embed.{part}_embedder.linear_2.bias") for part in ("text", "timestep")]
    damaged = {
        1: {out: replace(places[out], swapped=False)},
        2: {q: places[k], k: places[q]},
        3: {norm[0]: places[norm[1]], norm[1]: places[norm[0]], out: replace(places[out], swapped=False)},
    }
    for count, wrong in damaged.items():
        check = reader_check(family, file, places | wrong)
        assert not check.passed and check.value == count
    missing = {key: place for key, place in places.items() if place.key != places[out].key}
    assert "does not read the file" in reader_check(family, file, missing).how


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_other_components_are_read_as_diffusers_reads_them(family: str) -> None:
    places = to_single(family, others(family))
    file = in_file(places)
    meta = {key: torch.empty(shape, device="meta") for key, shape in file.items()}
    prefixes = LAYOUTS[family].prefixes
    read = {
        "vae": convert_ldm_vae_checkpoint(meta, {"down_block_types": [""] * 2, "up_block_types": [""] * 2}),
        LAYOUTS[family].t5[0]: convert_sd3_t5_checkpoint_to_diffusers(meta),
        "text_encoder": convert_ldm_clip_checkpoint(meta, prefixes["text_encoder"]),
    }
    if family == "sd3":
        read["text_encoder_2"] = convert_ldm_clip_checkpoint(meta, prefixes["text_encoder_2"])
    names = {
        (component, canonical(component, key)): tuple(tensor.shape)
        for component, tensors in read.items()
        for key, tensor in tensors.items()
    }
    left_out = {"text_encoder": {PROJECTION}, LAYOUTS[family].t5[0]: {"encoder.embed_tokens.weight"}}
    wanted = {
        (component, canonical(component, key)): shape
        for component, own in others(family).items()
        for key, shape in own.items()
        if key not in left_out.get(component, ())
    }
    assert names == wanted
    whole = file | in_file(to_single(family, {"transformer": transformer("sd3" if family == "sd3" else "flux-dev")}))
    back = {name: place.folder_shape for name, place in from_single(family, whole).items() if name[0] in read}
    assert back == wanted
    assert ("text_encoder_2", PROJECTION) in wanted or family == "flux"
    assert detect_single(whole) == family


def test_either_name_of_the_embedding_of_t5_is_enough() -> None:
    t5 = others("flux")["text_encoder_2"]
    for names in (
        ("shared.weight",),
        ("encoder.embed_tokens.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ):
        own = {key: shape for key, shape in t5.items() if key in names or "block" in key}
        file = in_file(to_single("flux", {"text_encoder_2": own}))
        assert sum(key.endswith(("shared.weight", "embed_tokens.weight")) for key in file) == 1
        assert file.keys() >= {"text_encoders.t5xxl.transformer.shared.weight"}
        places = to_single("flux", {"text_encoder_2": own})
        assert {key for _, key in places} == own.keys() - set(names[1:])
        named = {key.replace("shared.weight", names[0]): shape for key, shape in file.items()}
        assert ("text_encoder_2", "shared.weight") in from_single("flux", named)


def test_constants_and_scales_of_programs_are_left_out() -> None:
    file = in_file(to_single("flux", {"transformer": transformer("flux-dev"), **others("flux")}))
    more = {
        "text_encoders.clip_l.logit_scale": (),
        "text_encoders.clip_l.transformer.text_projection.weight": (16, 16),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": (1, 77),
    }
    assert from_single("flux", file | more) == from_single("flux", file)
    with pytest.raises(ErasecError, match="unheard_of is no tensor of flux's transformer"):
        from_single("flux", file | {PREFIX + "unheard_of": ()})


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_damaged_files_and_folders_are_refused(name: str) -> None:
    family, own = family_of(name), dict(transformer(name))
    file = in_file(to_single(family, {"transformer": own}))
    block = "joint_blocks" if family == "sd3" else "double_blocks"
    with pytest.raises(ErasecError, match="have a gap"):
        from_single(family, {key: shape for key, shape in file.items() if f"{block}.0." not in key})
    joint = next(key for key in file if key.endswith("attn.qkv.bias"))
    with pytest.raises(ErasecError, match=r"qkv\.bias is \(47,\)"):
        from_single(family, file | {joint: (47,)})
    with pytest.raises(ErasecError, match=r"norm_out\.linear\.bias is \(3,\)"):
        to_single(family, {"transformer": own | {"norm_out.linear.bias": (3,)}})
    for key in ("transformer_blocks.0.attn.to_k.weight", "single_transformer_blocks.1.proj_mlp.bias"):
        if key in own:
            with pytest.raises(ErasecError, match=r"a part of .* is missing"):
                to_single(family, {"transformer": {name: shape for name, shape in own.items() if name != key}})
    if family == "flux":
        wide = own | {"single_transformer_blocks.0.proj_mlp.bias": (4 * 3072 + 4,)}
        with pytest.raises(ErasecError, match=r"a part of .* is missing"):
            to_single(family, {"transformer": wide})


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_relatives_are_no_family(name: str) -> None:
    """A model without one of the tensors of its rule, such as Chroma and FLUX.2, which embed no pooled text."""
    file = in_file(to_single(family_of(name), {"transformer": transformer(name)}))
    for key in LAYOUTS[family_of(name)].detect.dimensions:
        for prefix in (PREFIX, ""):
            own = {prefix + other.removeprefix(PREFIX): shape for other, shape in file.items() if other != key}
            with pytest.raises(ErasecError, match="no single-file checkpoint") as caught:
                detect_single(own)
            assert "a relative of" in caught.value.why


def test_every_form_in_the_family_files_is_known() -> None:
    for family in ("sd3", "flux"):
        own = FAMILIES[family].single_file
        assert own is not None
        forms = {form for value in own.modules.values() if not isinstance(value, str) for form in value[1:]}
        assert forms and forms <= set(FORMS)
