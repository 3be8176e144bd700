"""Families: detected from shapes alone, and their sites, on the libraries' own models on the meta device. A made-up
family shows that one data file is enough to add another one."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from random_models import random_folder, random_shapes

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.family import FAMILIES, FOLDER, Family, Shape, Site, detect, read_families, sites
from erasec.ldm import configs, tensor_names
from erasec.model import loading
from erasec.passes.uce import Uce
from erasec.recipe.concept import Concept

JOINT: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 48}
SD3: dict[str, Any] = JOINT | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = JOINT | {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


def shapes(kind: str, **config: Any) -> dict[str, Shape]:
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def sd35() -> dict[str, Shape]:
    """As in Stable Diffusion 3.5, the first blocks attend twice."""
    return shapes("SD3Transformer2DModel", **SD3, dual_attention_layers=(0, 1))


@pytest.fixture(scope="module")
def flux() -> dict[str, Shape]:
    return shapes("FluxTransformer2DModel", **FLUX, guidance_embeds=True)


def counts(own: tuple[Site, ...]) -> Counter[tuple[str, str]]:
    """How many sites attend to each thing and compute each projection."""
    return Counter((site.attn, site.proj) for site in own)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_unets_are_detected_and_have_four_projections_per_attention(family: str) -> None:
    unet = random_shapes(family, "tiny")["unet"]
    assert detect(unet).name == family
    blocks = sum(key.endswith(".attn2.to_k.weight") for key in unet)
    embeds = {("pooled", "embed"): 1} if family == "sdxl" else {}
    assert counts(sites(FAMILIES[family], unet)) == embeds | {
        (attn, proj): blocks for attn in ("self", "cross") for proj in ("q", "k", "v", "out")
    }


def test_transformers_are_detected(sd35: dict[str, Shape], flux: dict[str, Shape]) -> None:
    assert detect(sd35).name == "sd3"
    assert detect(shapes("SD3Transformer2DModel", **SD3)).name == "sd3"
    assert detect(flux).name == "flux"
    assert detect(shapes("FluxTransformer2DModel", **FLUX)).name == "flux"
    assert {detect(own).denoiser for own in (sd35, flux)} == {"transformer"}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("SD3ControlNetModel", {key: value for key, value in SD3.items() if key != "qk_norm"}),
        ("FluxControlNetModel", FLUX),
        (
            "Flux2Transformer2DModel",
            {
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "joint_attention_dim": 48,
            },
        ),
        ("ChromaTransformer2DModel", {key: value for key, value in FLUX.items() if key != "pooled_projection_dim"}),
        (
            "PixArtTransformer2DModel",
            {
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "in_channels": 4,
                "num_layers": 1,
                "cross_attention_dim": 32,
                "caption_channels": 48,
                "sample_size": 8,
            },
        ),
        (
            "AuraFlowTransformer2DModel",
            {
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "joint_attention_dim": 48,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "caption_projection_dim": 32,
            },
        ),
    ],
)
def test_other_networks_are_no_family(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(ErasecError, match="no family") as caught:
        detect(shapes(kind, **config))
    assert "known: flux, sd1, sd2, sd3, sdxl" in caught.value.why


@pytest.mark.parametrize("key", [*FAMILIES["sd3"].embeddings, "proj_out.weight", "pos_embed.proj.weight"])
def test_without_any_one_tensor_of_its_rule_sd3_is_not_detected(sd35: dict[str, Shape], key: str) -> None:
    with pytest.raises(ErasecError, match="no family"):
        detect({name: shape for name, shape in sd35.items() if name != key})


def test_sites_of_sd3(sd35: dict[str, Shape]) -> None:
    """attn2 in the first blocks is a self-attention of the image. The last block has no output for the text."""
    own = sites(FAMILIES["sd3"], sd35)
    assert counts(own) == {
        ("context", "embed"): 1,
        ("pooled", "embed"): 1,
        ("context", "q"): 3,
        ("context", "k"): 3,
        ("context", "v"): 3,
        ("context", "out"): 2,
        ("joint", "q"): 3,
        ("joint", "k"): 3,
        ("joint", "v"): 3,
        ("joint", "out"): 3,
        ("self", "q"): 2,
        ("self", "k"): 2,
        ("self", "v"): 2,
        ("self", "out"): 2,
    }
    assert {site.key for site in own if site.attn == "self"} == {
        f"transformer_blocks.{block}.attn2.{name}.weight"
        for block in (0, 1)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_sites_of_flux(flux: dict[str, Shape]) -> None:
    """Single blocks read text and image as one sequence, so their projections serve both and have a kind of their own:
    what edits the image's stream must not edit them."""
    assert counts(sites(FAMILIES["flux"], flux)) == {
        ("context", "embed"): 1,
        ("pooled", "embed"): 1,
        ("context", "q"): 2,
        ("context", "k"): 2,
        ("context", "v"): 2,
        ("context", "out"): 2,
        ("joint", "q"): 2,
        ("joint", "k"): 2,
        ("joint", "v"): 2,
        ("joint", "out"): 2,
        ("single", "q"): 3,
        ("single", "k"): 3,
        ("single", "v"): 3,
    }


def test_embeddings_of_text_are_as_wide_as_the_text(sd35: dict[str, Shape], flux: dict[str, Shape]) -> None:
    for own, pooled in ((sd35, 40), (flux, 16)):
        embeds = {site.key: site for site in sites(detect(own), own) if site.proj == "embed"}
        assert embeds["context_embedder.weight"].shape == (32, 48)
        assert embeds["time_text_embed.text_embedder.linear_1.weight"].shape == (32, pooled)
        assert embeds["context_embedder.weight"].label == "context_embedder context embed"


def test_without_an_optional_encoder_its_rows_are_gone() -> None:
    whole = FAMILIES["sd3"]
    without_t5 = whole.without("text_encoder_3")
    assert without_t5.components == ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert without_t5.text_encoders == ("text_encoder", "text_encoder_2")
    assert [len(stream.parts) for stream in whole.streams] == [2, 1]
    assert [len(stream.parts) for stream in without_t5.streams] == [1, 1]
    with pytest.raises(ErasecError, match="flux cannot do without text_encoder_2"):
        FAMILIES["flux"].without("text_encoder_2")


def test_a_unet_that_embeds_sizes_is_sdxl_however_it_projects() -> None:
    unet = random_shapes("sd1", "tiny")["unet"] | {"add_embedding.linear_1.weight": (4, 4)}
    assert detect(unet).name == "sdxl"


# A UNet whose attention reads text as DeepFloyd's does: no attn2, but added keys and values in each attention.
TOY = """
name = "toy"
title = "Toy"
extends = "sd1"
trainable = false

[hub]
toy = "example/toy"

[detect.dimensions]
"conv_in.weight" = 4
"*.attentions.0.add_k_proj.weight" = 2

[attentions.attentions]
to_q = ["self", "q"]
to_k = ["self", "k"]
to_v = ["self", "v"]
to_out = ["self", "out"]
add_k_proj = ["cross", "k"]
add_v_proj = ["cross", "v"]

[configs.unet]
down_block_types = ["SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "DownBlock2D"]
mid_block_type = "UNetMidBlock2DSimpleCrossAttn"
up_block_types = ["UpBlock2D", "SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"]

[configs.sizes.tiny]
widths = [32, 64, 64]
depths = [1, 1, 0]
texts = [{ width = 64, layers = 2, mlp = 256 }]
vae = [32, 32, 64, 64]
"""


def family_files(folder: Path, **files: str) -> Path:
    """A copy of the family files with further ones."""
    shutil.copytree(FOLDER, folder)
    for stem, text in files.items():
        (folder / f"{stem}.toml").write_text(text)
    return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The made-up family, known to every module as if its file lay in the package."""
    families = read_families(family_files(tmp_path / "families", toy=TOY))
    assert families.keys() - FAMILIES.keys() == {"toy"}
    assert all(families[name] == family for name, family in FAMILIES.items())
    family = families["toy"]
    monkeypatch.setitem(FAMILIES, "toy", family)
    monkeypatch.setitem(configs.LAYOUTS, "toy", family.configs)
    monkeypatch.setitem(tensor_names.LAYOUTS, "toy", family.single_file)
    return family


def test_one_file_adds_a_family_that_inherits_the_rest(toy: Family) -> None:
    sd1 = FAMILIES["sd1"]
    assert (toy.components, toy.streams, toy.single_file) == (sd1.components, sd1.streams, sd1.single_file)
    assert (toy.hub, toy.trainable) == ({"toy": "example/toy"}, False)
    assert toy.attentions.keys() == {*sd1.attentions, "attentions"}
    assert toy.configs is not None and sd1.configs is not None
    assert toy.configs.scheduler == sd1.configs.scheduler


def test_the_added_family_is_detected_and_so_are_the_others(toy: Family) -> None:
    unet = random_shapes("toy", "tiny")["unet"]
    assert detect(unet) == toy
    assert [detect(random_shapes(name, "tiny")["unet"]).name for name in ("sd1", "sd2", "sdxl")] == [
        "sd1",
        "sd2",
        "sdxl",
    ]
    blocks = sum(key.endswith(".add_k_proj.weight") for key in unet)
    own = sites(toy, unet)
    assert blocks > 5
    assert counts(own) == {
        **{("self", proj): blocks for proj in ("q", "k", "v", "out")},
        **{("cross", proj): blocks for proj in ("k", "v")},
    }
    assert {site.block for site in own} == {"down.0", "down.1", "mid_block", "up.1", "up.2"}


def test_a_family_whose_rule_does_not_exclude_another_is_ambiguous(
    toy: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "toy", replace(toy, detect=FAMILIES["sd1"].detect))
    with pytest.raises(ErasecError, match="fits sd1 and toy") as caught:
        detect(random_shapes("sd1", "tiny")["unet"])
    assert "[detect]" in caught.value.fix


def test_uce_edits_a_model_of_the_added_family(toy: Family, tmp_path: Path) -> None:
    random_folder(tmp_path / "model", "toy")
    model = loading.load(str(tmp_path / "model"))
    assert model.family == toy
    concept = Concept(name="star", erase=("star",), anchor="ball", keep=("tree",), templates=("a {}",))
    edit = Uce(rows="last", ridge=1e-6).solve(model, concept, Context())
    assert {site.key for site in edit.deltas} == {
        site.key for site in model.sites if site.attn == "cross" and site.proj in ("k", "v")
    }
    edited_model = model.with_edit(edit)
    states = model.encode(["a star", "a ball", "a tree"]).states
    for site in edited_model.edited_sites:
        old, new = model.weight(site), edited_model.weight(site)
        (star, ball, tree), (edited, _, kept) = states.double() @ old.T, states.double() @ new.T
        # The last token of the phrase: "a star" is start, a, star, end.
        assert torch.dist(edited[2], ball[2]) < 0.05 * torch.dist(star[2], ball[2])
        assert torch.dist(kept[2], tree[2]) < 0.05 * torch.dist(star[2], ball[2])


@pytest.mark.parametrize(
    ("files", "name", "why"),
    [
        ({"toy": TOY.replace("trainable", "trainabel")}, "toy.toml", "there is no key trainabel"),
        (
            {"toy": TOY.replace("width = 64", "wide = 64")},
            "toy.toml",
            "there is no key configs.sizes.tiny.texts.0.wide",
        ),
        ({"toy": TOY.replace('name = "toy"\n', "", 1)}, "toy.toml", "name"),
        ({"toy": TOY.replace('"conv_in.weight" = 4', '"conv_in.weight" = "four"')}, "toy.toml", "conv_in.weight"),
        ({"toy": TOY.replace('"sd1"', '"sd9"')}, "toy.toml", "extends 'sd9'"),
        ({"toy": TOY.replace('"sd1"', '"tou"'), "tou": 'name = "tou"\nextends = "toy"'}, "tou.toml", "each other"),
        ({"toy": TOY.replace('"sd1"', '"toy"')}, "toy.toml", "each other"),
        ({"toy": 'name = "toy\nx = 1'}, "toy.toml", "line 1"),
    ],
)
def test_a_damaged_family_file_is_an_error_that_names_it(
    tmp_path: Path, files: dict[str, str], name: str, why: str
) -> None:
    with pytest.raises(ErasecError) as caught:
        read_families(family_files(tmp_path / "families", **files))
    assert name in caught.value.what
    assert why in caught.value.why
    assert str(tmp_path / "families") in caught.value.where


def test_two_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match=r"toy\.toml") as caught:
        read_families(family_files(tmp_path / "families", toy=TOY.replace('name = "toy"', 'name = "sd1"')))
    assert "sd1" in caught.value.why
