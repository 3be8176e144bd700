"""The manifest of an ONNX folder is read where it is sound and of this schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.graphs.manifest import MANIFEST, Origin, read_manifest, write_manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"graphs": {"unet": {}}})
    assert read_manifest(tmp_path) == {"schema": "erasec.onnx/1", "graphs": {"unet": {}}}


def test_an_origin_lists_the_replaced_tensors_of_a_component() -> None:
    origin = Origin({"unet": "0" * 64}, {"unet/a.weight": "1", "text_encoder/b": "2", "unet/c": "3"})
    assert origin.replaced("unet") == ("a.weight", "c")
    assert origin.replaced("vae") == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "missing or damaged"),
        ("[]", "missing or damaged"),
        ('{"schema": "erasec.onnx/9"}', "reads erasec.onnx/1"),
        ('{"schema": "erasec.onnx/1", "graphs": {"../x": {}}}', "missing or damaged"),
        (None, "missing or damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ErasecError) as caught:
        read_manifest(tmp_path)
    assert words in caught.value.why
    assert caught.value.fix
