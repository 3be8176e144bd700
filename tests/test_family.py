"""Families: told from shapes alone, and their sites; on the libraries' own models, built without memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import diffusers
import pytest
import torch

from erasec.errors import ErasecError
from erasec.family import CONTEXT, FAMILIES, POOLED, Shape, Site, detect, sites
from erasec.ldm.skeleton import random_shapes

JOINT: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 48}
SD3: dict[str, Any] = JOINT | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "caption_projection_dim": 32,
    "pooled_projection_dim": 40, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX: dict[str, Any] = JOINT | {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


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


def counts(found: tuple[Site, ...]) -> Counter[tuple[str, str]]:
    return Counter((site.attn, site.proj) for site in found)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_unets(family: str) -> None:
    unet = random_shapes(family, "tiny")["unet"]
    assert detect(unet).name == family
    found = counts(sites("unet", unet))
    blocks = sum(key.endswith(".attn2.to_k.weight") for key in unet)
    assert found == {(attn, proj): blocks for attn in ("self", "cross") for proj in ("q", "k", "v", "out")}


def test_transformers(sd35: dict[str, Shape], flux: dict[str, Shape]) -> None:
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
        ("Flux2Transformer2DModel", {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
                                     "num_attention_heads": 4, "joint_attention_dim": 48}),
        ("ChromaTransformer2DModel", {key: value for key, value in FLUX.items() if key != "pooled_projection_dim"}),
        ("PixArtTransformer2DModel", {"attention_head_dim": 8, "num_attention_heads": 4, "in_channels": 4,
                                      "num_layers": 1, "cross_attention_dim": 32, "caption_channels": 48,
                                      "sample_size": 8}),
        ("AuraFlowTransformer2DModel", {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 48,
                                        "num_mmdit_layers": 1, "num_single_dit_layers": 1,
                                        "caption_projection_dim": 32}),
    ],
)  # fmt: skip
def test_other_networks_are_no_family(kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(ErasecError, match="no family") as caught:
        detect(shapes(kind, **config))
    assert "sd3, flux" in caught.value.why


@pytest.mark.parametrize("key", [CONTEXT, POOLED, "proj_out.weight", "pos_embed.proj.weight"])
def test_every_mark_of_a_family_is_needed(sd35: dict[str, Shape], key: str) -> None:
    with pytest.raises(ErasecError, match="no family"):
        detect({name: shape for name, shape in sd35.items() if name != key})


def test_sites_of_sd3(sd35: dict[str, Shape]) -> None:
    """The second attention of the first blocks is the image's with itself; the last block has no text to give back."""
    found = sites("transformer", sd35)
    assert counts(found) == {
        ("context", "embed"): 1, ("pooled", "embed"): 1,
        ("context", "q"): 3, ("context", "k"): 3, ("context", "v"): 3, ("context", "out"): 2,
        ("joint", "q"): 3, ("joint", "k"): 3, ("joint", "v"): 3, ("joint", "out"): 3,
        ("self", "q"): 2, ("self", "k"): 2, ("self", "v"): 2, ("self", "out"): 2,
    }  # fmt: skip
    assert {site.key for site in found if site.attn == "self"} == {
        f"transformer_blocks.{block}.attn2.{name}.weight" for block in (0, 1)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }  # fmt: skip


def test_sites_of_flux(flux: dict[str, Shape]) -> None:
    """Single blocks read text and image as one sequence."""
    found = sites("transformer", flux)
    assert counts(found) == {
        ("context", "embed"): 1, ("pooled", "embed"): 1,
        ("context", "q"): 2, ("context", "k"): 2, ("context", "v"): 2, ("context", "out"): 2,
        ("joint", "q"): 5, ("joint", "k"): 5, ("joint", "v"): 5, ("joint", "out"): 2,
    }  # fmt: skip


def test_embeddings_of_text_are_as_wide_as_the_text(sd35: dict[str, Shape], flux: dict[str, Shape]) -> None:
    for own, pooled in ((sd35, 40), (flux, 16)):
        embeds = {site.key: site for site in sites("transformer", own) if site.proj == "embed"}
        assert embeds["context_embedder.weight"].shape == (32, 48)
        assert embeds["time_text_embed.text_embedder.linear_1.weight"].shape == (32, pooled)
        assert embeds["context_embedder.weight"].label == "context_embedder context embed"


def test_an_optional_encoder_goes_with_its_rows() -> None:
    whole = FAMILIES["sd3"]
    less = whole.without("text_encoder_3")
    assert less.components == ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert less.text_encoders == ("text_encoder", "text_encoder_2")
    assert [len(stream.parts) for stream in whole.streams] == [2, 1]
    assert [len(stream.parts) for stream in less.streams] == [1, 1]
    with pytest.raises(ErasecError, match="flux cannot do without text_encoder_2"):
        FAMILIES["flux"].without("text_encoder_2")
