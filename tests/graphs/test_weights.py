"""Weights of ONNX files: digests do not depend on where the data are stored, and change with every byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from erasec.errors import ErasecError
from erasec.graphs.weights import digests, read_weights, weight_digests

onnx = pytest.importorskip("onnx")


def graph(path: Path, weights: dict[str, np.ndarray], beside: bool = False, operation: str = "MatMul") -> Path:
    """A product of ``x`` and the first weight, with the weights in the file or beside it."""
    from onnx import helper, numpy_helper

    first = next(iter(weights))
    node = helper.make_node(operation, ["x", first], ["y"])
    infos = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(helper.make_graph([node], "graph", infos[:1], infos[1:], tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": "data", "size_threshold": 0} if beside else {}
    onnx.save(model, path, **options)
    return path


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (4, 3), "b": (3,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_digests_do_not_depend_on_where_weights_are_kept(tmp_path: Path) -> None:
    inside, beside = graph(tmp_path / "a" / "g.onnx", draw()), graph(tmp_path / "b" / "g.onnx", draw(), beside=True)
    assert inside.read_bytes() != beside.read_bytes()
    assert (tmp_path / "b" / "data").is_file()
    assert digests(inside) == digests(beside)
    assert weight_digests(inside) == weight_digests(beside)


def test_another_weight_changes_the_digest_of_weights_and_another_node_that_of_the_graph(tmp_path: Path) -> None:
    first = digests(graph(tmp_path / "first", draw()))
    weights = digests(graph(tmp_path / "weights", draw(1)))
    node = digests(graph(tmp_path / "node", draw(), operation="Mul"))
    assert weights[0] == first[0] and weights[1] != first[1]
    assert node[0] != first[0] and node[1] == first[1]


def test_weights_can_be_left_out(tmp_path: Path) -> None:
    other = draw() | {"b": draw(1)["b"]}
    files = graph(tmp_path / "first", draw()), graph(tmp_path / "other", other)
    skipped, included = ([digests(file, names) for file in files] for names in (("b",), ("w",)))
    assert skipped[0] == skipped[1]
    assert included[0] != included[1]


def test_a_byte_of_the_file_beside_it_is_seen(tmp_path: Path) -> None:
    file = graph(tmp_path / "g.onnx", draw(), beside=True)
    before = digests(file), weight_digests(file)
    data = bytearray((tmp_path / "data").read_bytes())
    data[0] ^= 1
    (tmp_path / "data").write_bytes(data)
    assert digests(file)[0] == before[0][0]
    assert digests(file)[1] != before[0][1]
    changed = {name for name, digest in weight_digests(file).items() if digest != before[1][name]}
    assert len(changed) == 1


@pytest.mark.parametrize("beside", [False, True])
def test_weights_are_read_as_they_are(tmp_path: Path, beside: bool) -> None:
    arrays = read_weights(graph(tmp_path / "g.onnx", draw(), beside), {"w", "none"})
    assert list(arrays) == ["w"]
    np.testing.assert_array_equal(arrays["w"], draw()["w"])


def test_weights_that_are_no_raw_bytes_count_too(tmp_path: Path) -> None:
    from onnx import helper

    file = graph(tmp_path / "g.onnx", {"w": np.ones((2, 2), np.float32)})
    model = onnx.load(file)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", 1, (2, 2), [1.0, 1.0, 1.0, 1.0]))
    assert not model.graph.initializer[0].raw_data
    onnx.save(model, tmp_path / "typed.onnx")
    assert digests(tmp_path / "typed.onnx") == digests(file)


@pytest.mark.parametrize(
    ("prepare", "entries", "words"),
    [
        (lambda folder: None, {"location": "/dev/zero", "length": "9" * 18}, "'/dev/zero' is no file of the folder"),
        (lambda folder: None, {"location": "../g.onnx"}, "'../g.onnx' is no file of the folder"),
        (lambda folder: None, {"location": "a\0b"}, "is no file of the folder"),
        (lambda folder: os.mkfifo(folder / "pipe"), {"location": "pipe"}, "it is no regular file"),
        (lambda folder: (folder / "link").symlink_to("/dev/zero"), {"location": "link"}, "it is a link to /dev/zero"),
        (lambda folder: None, {"location": "none"}, "none has none"),
        (lambda folder: None, {"location": "data", "length": "9" * 18}, "data has none"),
        (lambda folder: None, {"location": "data", "offset": "-4"}, "data has none"),
        (lambda folder: None, {"location": "data", "offset": "9" * 5000}, "data has none"),
    ],
)
def test_data_are_read_from_regular_files_of_the_folder_only(
    tmp_path: Path, prepare: Callable[[Path], None], entries: dict[str, str], words: str
) -> None:
    file = graph(tmp_path / "unet" / "g.onnx", {"w": draw()["w"]}, beside=True)
    prepare(file.parent)
    model = onnx.load(file, load_external_data=False)
    del model.graph.initializer[0].external_data[:]
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    for read in (digests, weight_digests, lambda file: read_weights(file, {"w"})):
        with pytest.raises(ErasecError) as caught:
            read(file)
        assert words in f"{caught.value.what}: {caught.value.why}" and caught.value.fix


def test_hard_links_and_the_blobs_of_the_hub_s_cache_are_read(tmp_path: Path) -> None:
    own = graph(tmp_path / "own" / "g.onnx", draw(), beside=True)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("g.onnx", "data"):
        os.link(own.parent / name, linked / name)
    assert digests(linked / "g.onnx") == digests(own)
    blobs, snapshot = tmp_path / "repository" / "blobs", tmp_path / "repository" / "snapshots" / "ab" / "onnx" / "unet"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("g.onnx", "data"):
        (blobs / name).write_bytes((own.parent / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert digests(snapshot / "g.onnx") == digests(own)
