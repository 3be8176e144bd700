"""Places of matrices in an engine: exact to the byte, and used only where a build has proven them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erasec.tensorrt import engines, patching
from erasec.tensorrt.engines import RTX, Builder
from erasec.tensorrt.patching import MatrixLocation, first_difference, locate, patch, text_projections

onnx = pytest.importorskip("onnx")
KEY, VALUE = "a.to_k.weight:transpose", "a.to_v.weight:transpose"
HEAD = 40  # its root is no power of two, so that rounding shows
PROFILE = {"x": [(1,), (1,), (1,)]}
Array = np.ndarray[Any, Any]


def draw(seed: int, dtype: str = "float16", width: int = 80) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal((24, width)) / 8).astype(dtype) for name in (KEY, VALUE)}


def scaled(matrix: Array) -> Array:
    return matrix * matrix.dtype.type(HEAD**-0.25)


def fused(matrices: Mapping[str, Array]) -> bytes:
    """A value, its key and other matrices side by side in every row, as the library keeps them."""
    dtype = matrices[KEY].dtype
    other = np.random.default_rng(9).standard_normal((24, 40)).astype(dtype)
    rows = np.concatenate([other, matrices[VALUE], scaled(matrices[KEY]), other], axis=1)
    return b"head" * 50 + rows.tobytes() + b"tail" * 20


def unfused(matrices: Mapping[str, Array]) -> bytes:
    """Value and key one after the other."""
    return b"head" * 50 + matrices[VALUE].tobytes() + scaled(matrices[KEY]).tobytes() + b"tail" * 20


def file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", [fused, unfused])
def test_values_and_scaled_keys_are_found(tmp_path: Path, dtype: str, layout: Any) -> None:
    matrices = draw(0, dtype)
    size, row = np.dtype(dtype).itemsize, 80 * np.dtype(dtype).itemsize
    places = locate(file(tmp_path / "engine", layout(matrices)), matrices)
    scale = float(np.dtype(dtype).type(HEAD**-0.25))
    if layout is fused:
        start, stride = 200 + 40 * size, row * 3
        wanted = {VALUE: MatrixLocation(start, stride, 1.0), KEY: MatrixLocation(start + row, stride, scale)}
    else:
        wanted = {VALUE: MatrixLocation(200, row, 1.0), KEY: MatrixLocation(200 + 24 * row, row, scale)}
    assert places == wanted


@pytest.mark.parametrize("layout", [fused, unfused])
def test_a_matrix_with_a_changed_byte_has_no_place(tmp_path: Path, layout: Any) -> None:
    matrices, content = draw(0), bytearray(layout(draw(0)))
    places = locate(file(tmp_path / "engine", content), matrices)
    for name, lost in ((KEY, {KEY}), (VALUE, {KEY, VALUE})):  # a key is looked for beside its value
        other = bytearray(content)
        other[places[name].offset + 3 * places[name].stride + 5] ^= 1
        assert matrices.keys() - locate(file(tmp_path / "other", other), matrices).keys() == lost
    assert locate(file(tmp_path / "unedited", layout(draw(1))), matrices) == {}


def test_a_matrix_that_is_there_twice_has_no_place(tmp_path: Path) -> None:
    matrices = draw(0)
    assert locate(file(tmp_path / "engine", unfused(matrices) + matrices[VALUE].tobytes()), matrices) == {}


def test_a_file_that_ends_early_has_no_place(tmp_path: Path) -> None:
    matrices = draw(0)
    whole = 200 + 2 * 24 * 160
    assert locate(file(tmp_path / "engine", unfused(matrices)[: whole - 2]), matrices).keys() == {VALUE}
    assert locate(file(tmp_path / "engine", unfused(matrices)[:300]), matrices) == {}


@pytest.mark.parametrize("layout", [fused, unfused])
def test_a_patched_engine_is_the_one_of_the_other_matrices(tmp_path: Path, layout: Any) -> None:
    old, new = draw(0), draw(1)
    engine = file(tmp_path / "engine", layout(old))
    patch(engine, tmp_path / "patched", locate(engine, old), new)
    assert (tmp_path / "patched").read_bytes() == layout(new) != layout(old)
    assert engine.read_bytes() == layout(old)


def test_only_names_that_the_library_generates_may_differ(tmp_path: Path) -> None:
    weights = bytes(range(128, 256)) * 40

    def engine(name: str, text: bytes, tail: bytes = weights) -> Path:
        return file(tmp_path / name, b"\0" + text + b"\0" + tail)

    one = engine("one", b"copy___mye137_shape_/up.1/norm")
    assert first_difference(one, one) == ""
    assert first_difference(one, engine("digits", b"copy___mye442_shape_/up.1/norm")) == ""
    assert first_difference(one, engine("words", b"copy___mye442_shape_/up.2/norm")) == ""
    moved, back = b"copy __mye7_up.1 to __mye12_down.0}\n", b"copy __mye12_down.0 to __mye7_up.1}\n"
    assert first_difference(engine("moved", moved), engine("back", back)) == ""
    assert "differs" in first_difference(engine("moved", moved), engine("back", back.replace(b"copy", b"move")))
    assert "byte 10 differs" in first_difference(engine("plain", b"in a name of 1"), engine("other", b"in a name_of 1"))
    assert "byte 20 differs" in first_difference(one, engine("ended", b"copy___mye137_shape\0/up.1/norm"))
    assert "differs" in first_difference(
        one, engine("weights", b"copy___mye137_shape_/up.1/norm", weights[:-1] + b"\x80")
    )
    assert first_difference(one, engine("longer", b"copy___mye1371_shape_/up.1/norm")) == "their sizes differ"


def graph(path: Path, matrices: Mapping[str, Array], rest: float = 1.0) -> Path:
    """Keys and values of a text, and a matrix that reads something else."""
    from onnx import helper, numpy_helper

    nodes = [helper.make_node("Cast", ["encoder_hidden_states"], ["text"], to=10)]
    nodes += [helper.make_node("MatMul", ["text", name], [f"y{at}"]) for at, name in enumerate(matrices)]
    nodes.append(helper.make_node("MatMul", ["sample", "a.to_q"], ["q"]))
    tensors = [numpy_helper.from_array(value, name) for name, value in matrices.items()]
    tensors.append(numpy_helper.from_array(np.full((4, 4), rest, np.float16), "a.to_q"))
    infos = [helper.make_tensor_value_info(name, 1, None) for name in ("encoder_hidden_states", "sample", "q")]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", infos[:2], infos[2:], tensors)), path)
    return path


def test_projections_are_the_matrices_that_read_the_text(tmp_path: Path) -> None:
    matrices = text_projections(graph(tmp_path / "model.onnx", draw(0)))
    assert matrices.keys() == {KEY, VALUE}
    np.testing.assert_array_equal(matrices[KEY], draw(0)[KEY])


@dataclass
class Library:
    """In place of the real one: an engine is a name that it makes up, and the matrices of the graph."""

    names: list[str] = field(default_factory=lambda: ["__mye11", "__mye27", "__mye35", "__mye48"])
    built: int = 0
    rest: bytes = b""

    def build(self, graph: Path, engine: Path, profile: Any, builder: Builder) -> tuple[dict[str, Any], str]:
        engine.parent.mkdir(parents=True, exist_ok=True)
        engine.write_bytes(b"\0" + self.names[self.built].encode() + b"\0" + fused(text_projections(graph)) + self.rest)
        self.built += 1
        return engines.engine_entry(engine, patching.digests(graph), profile, 1.0), "1.7.1"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    library = Library()
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patching, "build_engine", library.build)
    monkeypatch.setattr(patching, "version", lambda library: "1.7.1")
    monkeypatch.setattr(patching, "installed", lambda package: "0.53.6")
    return library


def engine(tmp_path: Path, seed: int, rest: float = 1.0, **options: Any) -> dict[str, Any]:
    entry, version = patching.patched_engine(
        graph(tmp_path / str(seed) / "model.onnx", draw(seed), rest),
        tmp_path / "out" / "unet" / "model.engine",
        PROFILE,
        Builder(RTX, **options),
    )
    assert version == "1.7.1"
    return entry


def test_the_third_edit_is_patched_at_places_that_the_second_proved(tmp_path: Path, library: Library) -> None:
    for seed in (0, 1):
        assert "patched" not in engine(tmp_path, seed)
        assert library.built == seed + 1
    entry = engine(tmp_path, 2)
    assert library.built == 2
    written = tmp_path / "out" / "unet" / "model.engine"
    assert entry["patched"] == 2 and entry["engine"] == engines.file_digest(written)
    assert written.read_bytes() == b"\0__mye27\0" + fused(draw(2))
    assert (entry["graph"], entry["weights"]) == patching.digests(tmp_path / "2" / "model.onnx")


def test_the_same_matrices_give_the_cached_engine(tmp_path: Path, library: Library) -> None:
    first = engine(tmp_path, 0)
    again = engine(tmp_path, 0)
    assert library.built == 1
    assert again["engine"] == first["engine"] and again["patched"] == 0


def test_places_that_a_build_does_not_confirm_are_not_patched(tmp_path: Path, library: Library) -> None:
    library.rest = b"more"
    engine(tmp_path, 0)
    library.rest = b""  # the second engine ends before places may be
    engine(tmp_path, 1)
    engine(tmp_path, 2)
    assert library.built == 3


def test_the_proof_may_come_later(tmp_path: Path, library: Library) -> None:
    engine(tmp_path, 0)
    library.rest = b"more"
    engine(tmp_path, 1)
    engine(tmp_path, 2)
    assert library.built == 3
    engine(tmp_path, 3)  # the second and the third were the same but for names and places
    assert library.built == 3


@pytest.mark.parametrize("other", [{"rest": 2.0}, {"workspace": 5}, {"capabilities": ("80",)}])
def test_another_engine_proves_nothing_for_this_one(tmp_path: Path, library: Library, other: dict[str, Any]) -> None:
    engine(tmp_path, 0)
    engine(tmp_path, 1)
    engine(tmp_path, 2, **other)
    assert library.built == 3


@pytest.mark.parametrize("damage", ["model.engine", "places.json"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, library: Library, damage: str) -> None:
    engine(tmp_path, 0)
    engine(tmp_path, 1)
    (cached,) = tmp_path.glob(f"cache/engines/*/{damage}")
    cached.write_bytes(cached.read_bytes().replace(b"e", b"f", 1))
    engine(tmp_path, 2)
    assert library.built == 3


def test_a_place_that_is_not_proven_is_not_used(tmp_path: Path, library: Library) -> None:
    engine(tmp_path, 0)
    engine(tmp_path, 1)
    (file,) = tmp_path.glob("cache/engines/*/places.json")
    record = json.loads(file.read_text())
    assert record["proven"] == [KEY, VALUE]
    file.write_text(json.dumps(record | {"proven": [KEY]}))
    engine(tmp_path, 2)
    assert library.built == 3
