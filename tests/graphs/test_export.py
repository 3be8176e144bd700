"""Tracing: what a graph's cache key depends on, that no weight is read, and that parameters keep their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erasec.checkpoint import store
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import read_tensor
from erasec.errors import ErasecError
from erasec.graphs import export
from erasec.graphs.export import graph_template
from erasec.graphs.graph import FORMAT, Template
from erasec.graphs.signature import Graph, graphs
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras

onnx = pytest.importorskip("onnx")
PLACE = "mid_block.attentions.0.transformer_blocks.0.attn2"


def graph_named(folder: Path, name: str) -> Graph:
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
    """A function that returns the key of a graph, without tracing it."""
    monkeypatch.setattr(store, "read_folder", lambda kind, key: Path(kind, key))

    def key(name: str = "unet", precision: str = "fp32", opset: int = 18, folder: Path = bare, **more: Any) -> str:
        return graph_template(Folder(folder), graph_named(folder, name), precision, opset, **more).key

    return key


def test_the_key_does_not_depend_on_paths_and_names(key: Callable[..., str], random_folder: Path, bare: Path) -> None:
    before = key()
    assert key(folder=random_folder) == before
    rewrite(bare / "unet" / "config.json", _name_or_path="/somewhere/else", _diffusers_version="0.1.0")
    assert key() == before
    assert key("text_encoder") != before


def test_the_key_depends_on_all_that_the_graph_depends_on(
    key: Callable[..., str], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.zeros(3, 192)

    def carrying(rows: torch.Tensor = rows, at: str = PLACE, tokens: int = 0, **options: Any) -> Extras:
        names = {f"<{number}>": torch.zeros(128) for number in range(tokens)}
        return Extras((Memory(at, rows, rows, **options),), names)

    keys = {
        "plain": key(),
        "opset": key(opset=19),
        "fp16": key(precision="fp16"),
        "islands": key(precision="fp16", keep_in_fp32=("*norm*",)),
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
    keys["schedule"] = key(extras=carrying(mode="side", until=0.5))
    rewrite(bare / "unet" / "config.json", norm_eps=1e-3)
    keys["config"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(export, "version", lambda name: "99")
        keys["exporter"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(export, "FORMAT", FORMAT + 1)
        keys["erasec"] = key()
    assert len(set(keys.values())) == len(keys)


def test_the_key_depends_on_nothing_else(key: Callable[..., str]) -> None:
    zeros, ones = torch.zeros(3, 192), torch.ones(3, 192)
    carried = Extras((Memory(PLACE, zeros, zeros),), {"<a>": torch.zeros(128)}, "a star")
    other = Extras((Memory(PLACE, ones, ones),), {"<b>": torch.ones(128)}, "a heart")
    for name in ("unet", "text_encoder", "vae_decoder"):
        assert key(name, extras=carried) == key(name, extras=other)
    assert key("vae_decoder", extras=carried) == key("vae_decoder")
    assert key(keep_in_fp32=("*norm*",)) == key()  # in float32 every module is kept in it


def test_no_weight_is_read_and_every_parameter_has_its_initializer(bare: Path, random_folder: Path) -> None:
    entries = Folder(random_folder).entries("vae")
    listed = set[str]()
    for name in ("vae_decoder", "vae_encoder"):
        template = graph_template(Folder(bare), graph_named(bare, name), "fp32", 18)
        body = template.load().graph
        assert [tensor.name for tensor in body.initializer] == [weight.name for weight in template.weights]
        assert not any(tensor.raw_data or tensor.float_data or tensor.external_data for tensor in body.initializer)
        for tensor, weight in zip(body.initializer, template.weights, strict=True):
            assert tuple(tensor.dims) == weight.shape
            assert weight.source == tuple(entries[weight.key].shape)
        listed |= {weight.key for weight in template.weights}
    assert listed == set(entries)
    # Merged equal tensors would lack names: there are many equal ones here.
    contents = {read_tensor(entry).numpy().tobytes() for entry in entries.values()}
    assert len(contents) < len(entries)


def test_without_marks_equal_parameters_would_be_merged(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(export, "_mark", blank)
    graph = graph_named(bare, "vae_encoder")
    module = export.weightless_module(Folder(bare), graph, "fp32", (), Extras())
    _, weights = export.trace(module, Folder(bare), graph, 18)
    with_marks = graph_template(Folder(bare), graph, "fp32", 18).weights
    assert len({weight.key for weight in weights}) < len({weight.key for weight in with_marks})


def test_a_damaged_graph_is_traced_anew(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = graph_template(Folder(bare), graph_named(bare, "vae_encoder"), "fp32", 18)
    before = (template.root / "model.onnx").read_bytes()
    (template.root / "model.onnx").write_bytes(before[:-1])
    again = graph_template(Folder(bare), graph_named(bare, "vae_encoder"), "fp32", 18)
    assert (again.root / "model.onnx").read_bytes() == before

    def no(*_: Any) -> Any:
        raise AssertionError("traced again")

    monkeypatch.setattr(export, "trace", no)
    assert graph_template(Folder(bare), graph_named(bare, "vae_encoder"), "fp32", 18) == Template(
        template.root, template.key
    )


def test_in_fp16_only_the_named_modules_are_float32(bare: Path) -> None:
    template = graph_template(
        Folder(bare), graph_named(bare, "vae_encoder"), "fp16", 18, ("*norm*", "of.another.component")
    )
    whole = {weight.key for weight in template.weights if weight.dtype == "float32"}
    assert whole == {weight.key for weight in template.weights if "norm" in weight.key}
    assert 0 < len(whole) < len(template.weights)
    body = template.load().graph
    assert {value.type.tensor_type.elem_type for value in (*body.input, *body.output)} == {onnx.TensorProto.FLOAT}
    stored = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    assert [stored[tensor.data_type] for tensor in body.initializer] == [weight.dtype for weight in template.weights]


def test_new_tokens_that_the_tokenizer_cannot_place_are_refused(bare: Path, tmp_path: Path) -> None:
    rewrite(bare / "text_encoder" / "config.json", vocab_size=5000)
    with pytest.raises(ErasecError, match="the new tokens have no place") as caught:
        export.negative_ids(Folder(bare), Extras((), {"<a>": torch.zeros(128)}), tmp_path / "out")
    assert "5000" in caught.value.why


def test_inputs_are_seeded_and_of_the_requested_size(bare: Path) -> None:
    for graph in graphs(Folder(bare)):
        one, same, other = (
            export.sample_inputs(Folder(bare), graph, (3, 2, 4), 7, torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        )
        assert list(one) == list(graph.inputs)
        assert all(one[name].equal(same[name]) for name in one)
        assert not all(one[name].equal(other[name]) for name in one)
        assert {len(value) for value in one.values() if value.dim()} == {3}
    unet = export.sample_inputs(Folder(bare), graph_named(bare, "unet"), (1, 2, 4), 7, torch.Generator().manual_seed(0))
    assert unet["sample"].shape == (1, 4, 8, 16)
    assert unet["timestep"].item() == 7.0
