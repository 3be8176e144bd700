"""Tracing: what a graph's key depends on, that no weight is read, and that every parameter keeps its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.graphs import export as tracing
from erasec.graphs import graph as kept
from erasec.graphs.export import template
from erasec.graphs.graph import Graph, Template, graphs
from erasec.model.edit import Memory
from erasec.model.sidecar import Extras

onnx = pytest.importorskip("onnx")
PLACE = "mid_block.attentions.0.transformer_blocks.0.attn2"


def named(folder: Path, name: str) -> Graph:
    return next(graph for graph in graphs(Folder(folder)) if graph.name == name)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def bare(random_folder: Path, tmp_path: Path) -> Path:
    """The checkpoint without any of its weights."""
    left_out = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(random_folder, tmp_path / "bare", ignore=left_out))


@pytest.fixture
def key(bare: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The key of a graph, of which nothing is traced."""
    monkeypatch.setattr(tracing, "whole", lambda _: True)

    def key(name: str = "unet", precision: str = "fp32", opset: int = 18, folder: Path = bare, **more: Any) -> str:
        return template(Folder(folder), named(folder, name), precision, opset, **more).key

    return key


def test_the_key_knows_no_path_and_no_name(key: Callable[..., str], random_folder: Path, bare: Path) -> None:
    before = key()
    assert key(folder=random_folder) == before
    rewrite(bare / "unet" / "config.json", _name_or_path="/somewhere/else", _diffusers_version="0.1.0")
    assert key() == before
    assert key("text_encoder") != before


def test_the_key_knows_all_that_the_graph_depends_on(
    key: Callable[..., str], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.zeros(3, 192)

    def carrying(rows: torch.Tensor = rows, at: str = PLACE, tokens: int = 0, **options: Any) -> Extras:
        names = {f"<{number}>": torch.zeros(128) for number in range(tokens)}
        return Extras((Memory(at, rows, rows, **options),), names)

    found = {
        "plain": key(),
        "opset": key(opset=19),
        "fp16": key(precision="fp16"),
        "islands": key(precision="fp16", islands=("*norm*",)),
        "memory": key(extras=carrying()),
        "its rows": key(extras=carrying(rows[:2])),
        "its place": key(extras=carrying(at=PLACE.replace("0.attn2", "1.attn2"))),
        "its mode": key(extras=carrying(mode="side")),
        "its weight": key(extras=carrying(mode="side", weight=2.0)),
        "its time": key(extras=carrying(mode="side", until=0.5)),
        "its half": key(extras=carrying(mode="side", guided=True)),
        "text": key("text_encoder"),
        "tokens": key("text_encoder", extras=carrying(tokens=1)),
        "two": key("text_encoder", extras=carrying(tokens=2)),
        "negative": key("text_encoder", negative=((1, 2), (3, 4))),
        "another": key("text_encoder", negative=((1, 2), (3, 5))),
    }
    rewrite(bare / "scheduler" / "scheduler_config.json", num_train_timesteps=100)
    found["schedule"] = key(extras=carrying(mode="side", until=0.5))
    rewrite(bare / "unet" / "config.json", norm_eps=1e-3)
    found["config"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "version", lambda name: "99")
        found["exporter"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "FORMAT", kept.FORMAT + 1)
        found["erasec"] = key()
    assert len(set(found.values())) == len(found)


def test_the_key_does_not_know_what_the_graph_does_not_depend_on(key: Callable[..., str]) -> None:
    zeros, ones = torch.zeros(3, 192), torch.ones(3, 192)
    carried = Extras((Memory(PLACE, zeros, zeros),), {"<a>": torch.zeros(128)}, "a star")
    other = Extras((Memory(PLACE, ones, ones),), {"<b>": torch.ones(128)}, "a heart")
    for name in ("unet", "text_encoder", "vae_decoder"):
        assert key(name, extras=carried) == key(name, extras=other)
    assert key("vae_decoder", extras=carried) == key("vae_decoder")
    assert key(islands=("*norm*",)) == key()  # in float32 every module is one


def test_no_weight_is_read_and_every_parameter_has_its_initializer(bare: Path, random_folder: Path) -> None:
    entries = Folder(random_folder).entries("vae")
    listed = set[str]()
    for name in ("vae_decoder", "vae_encoder"):
        found = template(Folder(bare), named(bare, name), "fp32", 18)
        body = found.load().graph
        assert [tensor.name for tensor in body.initializer] == [weight.name for weight in found.weights]
        assert not any(tensor.raw_data or tensor.float_data or tensor.external_data for tensor in body.initializer)
        for tensor, weight in zip(body.initializer, found.weights, strict=True):
            assert tuple(tensor.dims) == weight.shape
            assert weight.source == tuple(entries[weight.key].shape)
        listed |= {weight.key for weight in found.weights}
    assert listed == set(entries)
    # Had equal tensors been taken for one, names would be missing: there are many equal ones here.
    contents = {read_tensor(entry).numpy().tobytes() for entry in entries.values()}
    assert len(contents) < len(entries)


def test_without_marks_equal_parameters_would_be_taken_for_one(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(tracing, "_mark", blank)
    graph = named(bare, "vae_encoder")
    module = tracing.empty(Folder(bare), graph, "fp32", (), Extras())
    _, weights = tracing.traced(module, Folder(bare), graph, 18)
    with_marks = template(Folder(bare), graph, "fp32", 18).weights
    assert len({weight.key for weight in weights}) < len({weight.key for weight in with_marks})


def test_a_damaged_graph_is_traced_anew(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = template(Folder(bare), named(bare, "vae_encoder"), "fp32", 18)
    before = (found.root / "model.onnx").read_bytes()
    (found.root / "model.onnx").write_bytes(before[:-1])
    again = template(Folder(bare), named(bare, "vae_encoder"), "fp32", 18)
    assert (again.root / "model.onnx").read_bytes() == before

    def no(*_: Any) -> Any:
        raise AssertionError("traced again")

    monkeypatch.setattr(tracing, "traced", no)
    assert template(Folder(bare), named(bare, "vae_encoder"), "fp32", 18) == Template(found.root, found.key)


def test_in_fp16_only_islands_are_float32(bare: Path) -> None:
    found = template(Folder(bare), named(bare, "vae_encoder"), "fp16", 18, ("*norm*", "of.another.component"))
    whole = {weight.key for weight in found.weights if weight.dtype == "float32"}
    assert whole == {weight.key for weight in found.weights if "norm" in weight.key}
    assert 0 < len(whole) < len(found.weights)
    body = found.load().graph
    assert {value.type.tensor_type.elem_type for value in (*body.input, *body.output)} == {onnx.TensorProto.FLOAT}
    stored = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    assert [stored[tensor.data_type] for tensor in body.initializer] == [weight.dtype for weight in found.weights]


def test_new_tokens_that_the_tokenizer_cannot_place_are_told(bare: Path, tmp_path: Path) -> None:
    rewrite(bare / "text_encoder" / "config.json", vocab_size=5000)
    with pytest.raises(ErasecError, match="the new tokens have no place") as caught:
        tracing.negative_ids(Folder(bare), Extras((), {"<a>": torch.zeros(128)}), tmp_path / "out")
    assert "5000" in caught.value.why


def test_inputs_are_seeded_and_of_the_size_that_is_asked_for(bare: Path) -> None:
    for graph in graphs(Folder(bare)):
        one, same, other = (
            tracing.inputs(Folder(bare), graph, (3, 2, 4), 7, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert list(one) == list(graph.inputs)
        assert all(one[name].equal(same[name]) for name in one)
        assert not all(one[name].equal(other[name]) for name in one)
        assert {len(value) for value in one.values() if value.dim()} == {3}
    unet = tracing.inputs(Folder(bare), named(bare, "unet"), (1, 2, 4), 7, torch.Generator().manual_seed(0))
    assert unet["sample"].shape == (1, 4, 8, 16)
    assert unet["timestep"].item() == 7.0
