"""A file that carries a digest of its content: no changed byte is read as good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from erasec.checkpoint import journal, sealed
from erasec.checkpoint import safetensors as checkpoint
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


@pytest.mark.parametrize("spelled", ["as written", "with spaces", "with escapes"])
def test_an_edit_renews_the_digest_where_the_header_has_it(tmp_path: Path, spelled: str) -> None:
    checkpoint.save_tensors(tmp_path / "base", tensors(), {"quoted": f'"{sealed.DIGEST}":"0"'})
    sealed.patch_sealed(tmp_path / "base", tmp_path / "file", {"half": lambda: torch.zeros(5).half()})
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = {
        "as written": data[8 : 8 + length],
        "with spaces": json.dumps(json.loads(data[8 : 8 + length])).encode(),
        "with escapes": data[8 : 8 + length].replace(f'"{sealed.DIGEST}":'.encode(), rb'"erasec\u002edigest":'),
    }[spelled]
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    changed = {"rows": lambda: torch.zeros(3, 4)}
    if spelled == "with escapes":
        with pytest.raises(ErasecError, match="not edited in place"):
            journal.patch_in_place({tmp_path / "file": changed})
    else:
        journal.patch_in_place({tmp_path / "file": changed})
        assert sealed.read_sealed(tmp_path / "file")[1]["quoted"] == f'"{sealed.DIGEST}":"0"'
        entries, _ = checkpoint.read_header(tmp_path / "file")
        assert not checkpoint.read_tensor(entries["rows"]).any()
        assert not checkpoint.read_tensor(entries["half"]).any()
    assert not journal.pending(tmp_path / "file")
