"""A full disk is named with the file and the bytes that are missing."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from erasec.checkpoint import disk
from erasec.checkpoint import safetensors as checkpoint
from erasec.checkpoint.disk import DiskFull, exchange, mount_point, named_errors
from erasec.checkpoint.staging import output


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))


@pytest.mark.usefixtures("free")
def test_a_full_disk_names_the_file_the_disk_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "checked_data", full)
    with pytest.raises(DiskFull) as caught:
        checkpoint.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1000)})
    assert caught.value.where == str(tmp_path / "x.safetensors")
    assert caught.value.what == f"no space left on the disk at {mount_point(tmp_path)}"
    assert caught.value.why == "1 kB are free, and 4 kB are still to be written: 3 kB more are needed"
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("free")
def test_a_file_of_an_output_has_its_final_name_and_the_whole_rest_counts(tmp_path: Path) -> None:
    def build() -> None:
        with output(tmp_path / "out", total=5000) as own:
            (own.new_folder() / "first").write_bytes(bytes(500))
            with named_errors(own.stage / "second", total=10):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull) as caught:
        build()
    assert caught.value.where == str(tmp_path / "out" / "second")
    assert "4.5 kB are still to be written: 3.5 kB more are needed" in caught.value.why
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("free")
def test_another_disk_than_that_of_the_output_is_not_mixed_up_with_it(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught, output(tmp_path / "out", total=5000), named_errors(tmp_path / "tmp" / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.where == str(tmp_path / "tmp" / "x") and caught.value.why == "1 kB are free"


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.EFBIG):
        with pytest.raises(OSError, match="it") as caught, named_errors(tmp_path / "x"):
            raise OSError(number, "it")
        assert caught.value.filename == (str(tmp_path / "x") if number == errno.EFBIG else None)


def test_folders_are_exchanged_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange folders")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


def test_without_the_system_call_nothing_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: object())
    assert not exchange(tmp_path, tmp_path)
