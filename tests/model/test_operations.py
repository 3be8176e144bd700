"""Operations and saved values, counted from shapes, are those that torch counts and keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
from joint_models import pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from erasec.checkpoint.folder import trained_size
from erasec.model import loading, operations
from erasec.model.networks import load_network
from erasec.model.text_encoders import load_encoder
from erasec.model.view import Model


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model of the family, with latents of 16 x 16: of another size than the published ones."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    random_models.random_folder(folder, request.param, "tiny")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 16}))
    return loading.load(str(folder))


def inputs(model: Model, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the UNet for one row."""
    config = model.source.config("unet")
    height, width = trained_size(config)
    states = torch.randn(1, 77, config["cross_attention_dim"], device=device)
    more: dict[str, Any] = {"encoder_hidden_states": states}
    if model.family.name == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(1, pooled, device=device), "time_ids": torch.zeros(1, 6, device=device)}
        more["added_cond_kwargs"] = added
    return (torch.randn(1, 4, height, width, device=device), torch.tensor([5], device=device)), more


def counted(call: Any) -> float:
    """Operations as torch counts them; attention as products of matrices, of which it knows the operations."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def test_operations_are_those_that_torch_counts(model: Model) -> None:
    args, more = inputs(model, "meta")
    unet = load_network(model, "unet", "UNet2DConditionModel").to("meta")
    expected = counted(lambda: unet(*args, **more))
    assert operations.denoiser(model).operations == pytest.approx(expected, rel=0.02)
    # A control: without the attention of one level, or with a kernel more, it would not fit.
    assert operations.denoiser(model).operations != pytest.approx(0.95 * expected, rel=0.02)
    vae = load_network(model, "vae", "AutoencoderKL").to("meta")
    assert operations.decoder(model).operations == pytest.approx(counted(lambda: vae.decode(args[0])), rel=0.02)
    images = torch.zeros(1, 3, 128, 128, device="meta")
    assert operations.encoder(model).operations == pytest.approx(counted(lambda: vae.encode(images)), rel=0.02)
    encoders = [load_encoder(model.source, name, {}) for name in model.family.text_encoders]
    ids = torch.zeros(1, 77, dtype=torch.long)
    text = sum(counted(lambda encoder=encoder: encoder(ids)) for encoder in encoders)
    assert operations.text(model).operations == pytest.approx(text, rel=0.05)


def test_operations_grow_with_the_size_of_the_latents(model: Model) -> None:
    before = operations.denoiser(model)
    config = model.source.root / "unet" / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(text), "sample_size": 32}))
        after = operations.denoiser(loading.load(str(model.source.root)))
    finally:
        config.write_text(text)
    assert 3.5 < after.operations / before.operations < 8  # attention grows with the square of the pixels
    assert after.layers == before.layers
    assert after.saved > 3 * before.saved


def kept(unet: Any, args: Any, more: Any) -> float:
    """The number of values that a forward pass keeps for its backward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.dtype.is_floating_point and value.untyped_storage().data_ptr() not in weights:
            storages[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        unet(*args, **more)
    return sum(value.untyped_storage().nbytes() / value.element_size() for value in storages.values())


def test_saved_values_are_those_that_torch_keeps(model: Model) -> None:
    args, more = inputs(model, "cpu")
    unet = load_network(model, "unet", "UNet2DConditionModel").requires_grad_(True)
    cost = operations.denoiser(model)
    assert cost.saved == pytest.approx(kept(unet, args, more), rel=0.15)
    unet.enable_gradient_checkpointing()
    inputs_of_blocks = kept(unet, args, more)
    assert inputs_of_blocks < 0.5 * cost.saved
    # The largest block, whose values the backward pass has besides, is a part of the rest.
    assert inputs_of_blocks < cost.recomputed < 0.75 * cost.saved


@pytest.fixture(scope="module", params=["sd3", "sd3-no-t5"])
def joint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline(request.param).save_pretrained(folder)
    return loading.load(str(folder))


def test_those_of_joint_attention_as_well(joint: Model) -> None:
    network = load_network(joint, "transformer", "SD3Transformer2DModel").requires_grad_(True)
    args = torch.randn(1, 4, 8, 8), torch.randn(1, 77 + 256, 48), torch.randn(1, 40), torch.tensor([500.0])
    cost = operations.denoiser(joint)
    assert cost.operations == pytest.approx(counted(lambda: network(*args)), rel=0.03)
    whole = kept(network, args, {})
    assert cost.saved == pytest.approx(whole, rel=0.25)
    network.enable_gradient_checkpointing()
    assert kept(network, args, {}) < cost.recomputed < cost.saved


def test_blocks_of_one_stream_read_picture_and_text(tmp_path: Path) -> None:
    pipeline("flux").save_pretrained(tmp_path)
    model = loading.load(str(tmp_path))
    network = load_network(model, "transformer", "FluxTransformer2DModel").to("meta")
    patches = 64 * 64  # of FLUX's own size
    shapes = (1, patches, 16), (1, 512, 48), (1, 16), (1,), (patches, 3), (512, 3), (1,)
    args = [torch.zeros(shape, device="meta") for shape in shapes]
    assert operations.denoiser(model).operations == pytest.approx(counted(lambda: network(*args)), rel=0.03)
