"""A file that carries a digest of its content: no changed byte is read as good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint import sealed
from erasec.errors import ErasecError


def tensors() -> dict[str, Tensor]:
    return {"rows": torch.arange(12.0).reshape(3, 4), "half": torch.ones(5).half(), "ids": torch.arange(4)}


def test_no_flipped_byte_of_a_sealed_file_is_read_as_good(tmp_path: Path) -> None:
    content = tensors()
    sealed.save_sealed(tmp_path / "good", content, {"kind": "x"})
    good = (tmp_path / "good").read_bytes()
    wanted = {key: checkpoint.tensor_bytes(tensor) for key, tensor in content.items()}
    read_as_good = []
    for place in range(len(good)):
        (tmp_path / "bad").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            entries, metadata = sealed.read_sealed(tmp_path / "bad")
        except ErasecError:
            continue
        # The name of the digest itself was hit: the file counts as one of 0.1.0, and its content is whole.
        read_as_good.append(place)
        assert metadata["kind"] == "x" and sealed.DIGEST not in metadata
        assert {key: checkpoint.tensor_bytes(checkpoint.read_tensor(entry)) for key, entry in entries.items()} == wanted
    assert len(read_as_good) <= len(sealed.DIGEST)
    entries, metadata = sealed.read_sealed(tmp_path / "good")
    assert entries.keys() == wanted.keys() and metadata["kind"] == "x"


def test_a_file_without_a_digest_is_read_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save_tensors(tmp_path / "old", tensors())
    sealed.save_sealed(tmp_path / "new", tensors())
    for _ in range(2):
        assert sealed.read_sealed(tmp_path / "old")[0].keys() == tensors().keys()
        sealed.read_sealed(tmp_path / "new")
    note = " note: old is not verified: erasec 0.1.0 wrote no digest of its content into it\n"
    assert capsys.readouterr().err == note
