"""The manifest of an ONNX folder is read where it is sound and of this schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.graphs.manifest import MANIFEST, Origin, read_manifest, write_manifest

WEIGHT = {"name": "w", "key": "a.weight", "source": [2, 3], "axes": [1, 0], "shape": [3, 2], "dtype": "float32"}
GRAPH = {"component": "unet", "graph": "ab", "precision": "fp32", "files": {}, "weights": [WEIGHT], "edited": []}
CONTENT = {"precision": "fp32", "vae": "fp32", "graphs": {"unet": GRAPH}, "files": {}, "base": {}, "carried": []}
WHOLE = json.dumps({"schema": "erasec.onnx/1", **CONTENT})


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, CONTENT)
    assert read_manifest(tmp_path) == json.loads(WHOLE)


def test_an_origin_lists_the_replaced_tensors_of_a_component() -> None:
    origin = Origin({"unet": "0" * 64}, {"unet/a.weight": "1", "text_encoder/b": "2", "unet/c": "3"})
    assert origin.replaced("unet") == ("a.weight", "c")
    assert origin.replaced("vae") == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "EOF while parsing"),
        ("[]", "it should be an object"),
        ('{"schema": "erasec.onnx/9"}', "reads erasec.onnx/1"),
        (WHOLE.replace('"unet": {"c', '"../x": {"c'), "graphs.../x"),
        (WHOLE.replace("[1, 0]", "[0, 0]"), "its shape is no other arrangement of its source"),
        (WHOLE.replace("[3, 2]", "[3, 3]"), "its shape is no other arrangement of its source"),
        (None, "it has no erasec.json"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ErasecError) as caught:
        read_manifest(tmp_path)
    assert words in caught.value.why
    assert caught.value.fix
