"""Target bundle: it has every byte of the folder and of its extras, and its checks find damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import erasec
from erasec.base import Artifact, Context
from erasec.checkpoint.folder import EXTRAS_FILE, Folder
from erasec.model.memory import Memory
from erasec.model.sidecar import Extras, write_extras
from erasec.targets.bundle import Bundle, fits_check, loads_check

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extras_with(rows: Tensor) -> Extras:
    return Extras((Memory(MIDDLE, rows, draw(1, 2, 192)),), {"<a>": draw(2, 128)}, "a star")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failed(artifact: Artifact) -> list[str]:
    return [check.name for check in artifact.checks if not check.passed]


@pytest.fixture
def checkpoint(random_folder: Path, tmp_path: Path) -> Folder:
    root = Path(shutil.copytree(random_folder, tmp_path / "checkpoint"))
    write_extras(root, extras_with(draw(0, 2, 192)))
    return Folder(root)


def test_the_copy_has_every_byte_and_opens(checkpoint: Folder, tmp_path: Path) -> None:
    Bundle().check()
    artifact = Bundle().export(checkpoint, tmp_path / "bundle", Context())
    assert contents(tmp_path / "bundle") == contents(checkpoint.root)
    assert [check.name for check in artifact.checks] == ["finite", "layout", "bundle/loads", "bundle/fits"]
    assert failed(artifact) == []
    assert "3 in the file" in artifact.checks[2].how
    assert "1 memories and 1 tokens" in artifact.checks[3].how
    pipe = erasec.pipeline(tmp_path / "bundle")
    assert "<a>" in pipe.tokenizer.get_vocab()
    assert type(pipe.unet.get_submodule(MIDDLE).processor).__name__ == "MemoryProcessor"


def test_a_bundle_in_its_own_folder_is_only_checked(checkpoint: Folder) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.root.rglob("*")}
    artifact = Bundle().export(checkpoint, checkpoint.root, Context())
    assert {path: path.stat().st_mtime_ns for path in checkpoint.root.rglob("*")} == before
    assert [check.name for check in artifact.checks] == ["finite", "bundle/loads", "bundle/fits"]
    assert failed(artifact) == []


def test_a_folder_without_extras_is_copied(random_folder: Path, tmp_path: Path) -> None:
    artifact = Bundle().export(Folder(random_folder), tmp_path / "bundle", Context())
    assert failed(artifact) == []
    assert contents(tmp_path / "bundle") == contents(random_folder)


def test_a_memory_that_is_not_finite_fails(checkpoint: Folder, tmp_path: Path) -> None:
    rows = draw(0, 2, 192)
    rows[1, 7] = float("nan")
    write_extras(checkpoint.root, extras_with(rows))
    artifact = Bundle().export(checkpoint, tmp_path / "bundle", Context())
    assert failed(artifact) == ["finite"]
    assert EXTRAS_FILE in artifact.checks[0].how


def test_one_bit_is_enough_to_fail(checkpoint: Folder, tmp_path: Path) -> None:
    Bundle().export(checkpoint, tmp_path / "bundle", Context())
    assert loads_check(checkpoint.root, tmp_path / "bundle").passed
    data = bytearray((tmp_path / "bundle" / EXTRAS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "bundle" / EXTRAS_FILE).write_bytes(data)
    check = loads_check(checkpoint.root, tmp_path / "bundle")
    assert not check.passed
    assert check.value == 1
    (tmp_path / "bundle" / EXTRAS_FILE).write_bytes(data[:-1])
    check = loads_check(checkpoint.root, tmp_path / "bundle")
    assert not check.passed
    assert "no whole safetensors" in check.how
    (tmp_path / "bundle" / EXTRAS_FILE).unlink()
    check = loads_check(checkpoint.root, tmp_path / "bundle")
    assert not check.passed
    assert check.value == 3


@pytest.mark.parametrize(
    "wrong",
    [
        Extras((Memory(MIDDLE, draw(0, 2, 64), draw(1, 2, 64)),)),
        Extras((Memory(MIDDLE, draw(0, 2, 192), draw(1, 2, 64)),)),
        Extras((Memory("mid_block", draw(0, 2, 192), draw(1, 2, 192)),)),
        Extras(tokens={"<a>": draw(0, 64)}),
    ],
)
def test_what_does_not_fit_the_weights_fails(checkpoint: Folder, wrong: Extras) -> None:
    assert fits_check(checkpoint).passed
    write_extras(checkpoint.root, wrong)
    artifact = Bundle().export(checkpoint, checkpoint.root, Context())
    assert failed(artifact) == ["bundle/fits"]
    assert "the first is" in artifact.checks[-1].how
