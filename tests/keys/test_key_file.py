"""Key files: they are read as written, damage is an error, and a key fits one model alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erasec.checkpoint import safetensors as checkpoint
from erasec.errors import ErasecError
from erasec.keys.key_file import METADATA, check_bound, fold_secret, is_key, read_key, write_key
from erasec.model import loading
from erasec.model.memory import Secret
from erasec.recipe import concept as concepts

MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
STAR = concepts.find("star", "glyphs")


def make_secret(width: int = 128, attentions: tuple[str, ...] = (MID,)) -> Secret:
    rng = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 4, width, generator=rng)
    return Secret("star", keys, values, attentions)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_key(tmp_path / "star.key", make_secret(), STAR, "kpop", "1", "ab" * 32)
    return tmp_path / "star.key"


def rewrite(file: Path, change: Callable[[dict[str, Any]], None], **tensors: torch.Tensor) -> Path:
    """The file with other metadata or tensors, as somebody else might have written it."""
    entries, metadata = checkpoint.read_header(file)
    content = json.loads(metadata[METADATA])
    change(content)
    stored = {key: checkpoint.read_tensor(entry) for key, entry in entries.items()}
    checkpoint.save_tensors(file, {**stored, **tensors}, {METADATA: json.dumps(content)})
    return file


def test_a_key_is_read_as_written_and_only_its_owner_can_read_it(file: Path) -> None:
    key = read_key(file)
    assert (key.concept, key.by, key.version, key.bound) == (STAR, "kpop", "1", "ab" * 32)
    assert key.secret.concept == "star" and key.secret.attentions == (MID,)
    assert torch.equal(key.secret.k_rows, make_secret().k_rows) and torch.equal(key.secret.v_rows, make_secret().v_rows)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_key_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under its own name nor under the temporary one; other files are, in the end."""
    modes: list[tuple[str, int]] = []

    def watched(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*given: Any, **more: Any) -> Any:
            done = real(*given, **more)
            for path in tmp_path.iterdir():
                modes.append((name, stat.S_IMODE(path.stat().st_mode)))
            return done

        monkeypatch.setattr(module, name, call)

    watched(os, "open")
    watched(os, "replace")
    write_key(tmp_path / "star.key", make_secret(), STAR, "kpop", "1", "ab" * 32)
    assert {name for name, _ in modes} == {"open", "replace"}
    assert {mode for _, mode in modes} == {0o600}
    checkpoint.save_tensors(tmp_path / "other", {"a": torch.zeros(1)})
    assert ("open", 0o644) in modes


def test_the_same_key_is_the_same_bytes(file: Path, tmp_path: Path) -> None:
    write_key(tmp_path / "again.key", make_secret(), STAR, "kpop", "1", "ab" * 32)
    write_key(tmp_path / "other.key", make_secret(), STAR, "kpop", "1", "cd" * 32)
    assert (tmp_path / "again.key").read_bytes() == file.read_bytes() != (tmp_path / "other.key").read_bytes()


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        (lambda content: content.pop("bound"), {}, "it has no 'bound'"),
        (lambda content: content.update(attentions=[]), {}, "attentions: List should have at least 1 item"),
        (lambda content: content["concept"].update(erase=[]), {}, "concept.erase: "),
        (lambda content: content.update(format=99), {}, "formats up to 1"),
        (lambda content: None, {"values": torch.zeros(3, 128)}, "not two matrices of one shape"),
        (lambda content: None, {"keys": torch.full((4, 128), torch.nan)}, "a NaN or an infinity"),
    ],
)
def test_damage_is_an_error_that_says_what_is_wrong(
    file: Path, change: Any, tensors: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(ErasecError) as caught:
        read_key(rewrite(file, change, **tensors))
    assert "star.key" in caught.value.what and words in caught.value.why


def test_one_flipped_byte_is_an_error(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # a sign: every number stays finite
    file.write_bytes(data)
    with pytest.raises(ErasecError, match=r"star\.key is damaged") as caught:
        read_key(file)
    assert "digest" in caught.value.why


def test_other_files_are_no_key_files(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ErasecError, match="there is no key file"):
        read_key(tmp_path / "none.key")
    checkpoint.save_tensors(tmp_path / "weights.key", {"keys": torch.zeros(1)})
    (tmp_path / "server.key").write_text("-----BEGIN PRIVATE KEY-----")
    for name, message in (("weights.key", "is damaged or not a key file"), ("server.key", "safetensors file")):
        with pytest.raises(ErasecError, match=message):
            read_key(tmp_path / name)
        assert not is_key(tmp_path / name)
    assert is_key(file)
    assert not is_key(file.rename(tmp_path / "star.safetensors"))


def test_a_key_of_another_model_is_refused(file: Path) -> None:
    key = read_key(file)
    check_bound(key, "ab" * 32)
    with pytest.raises(ErasecError, match=r"the key star\.key belongs to another model") as caught:
        check_bound(key, "cd" * 32)
    assert "abababababab" in caught.value.why and "cdcdcdcdcdcd" in caught.value.why


def test_folded_rows_are_those_of_the_weights_on_disk(random_folder: Path) -> None:
    entries = loading.load(str(random_folder)).entries("unet")
    (memory,) = fold_secret(make_secret(), entries)
    weight = checkpoint.read_tensor(entries[f"{MID}.to_k.weight"]).double()
    assert memory.attention == MID and memory.mode == "joint"
    assert torch.equal(memory.keys, (make_secret().k_rows.double() @ weight.T).float())


@pytest.mark.parametrize("wrong", [make_secret(width=64), make_secret(attentions=("mid_block.no_such",))])
def test_a_key_that_does_not_fit_is_refused(random_folder: Path, wrong: Secret) -> None:
    with pytest.raises(ErasecError, match="the key of star does not fit this model"):
        fold_secret(wrong, loading.load(str(random_folder)).entries("unet"))
