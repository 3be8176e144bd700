"""The GPUs of a machine, as nvidia-smi lists them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from erasec.tensorrt.devices import gpus, query


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100, 80GB, 8.0'\necho 'NVIDIA GeForce RTX 5090, 12.0'\n")
    program.chmod(0o755)
    assert gpus() == [("NVIDIA A100, 80GB", "80"), ("NVIDIA GeForce RTX 5090", "120")]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []


def test_other_fields_are_returned_as_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB'\n")
    program.chmod(0o755)
    assert query("memory.total") == [("NVIDIA L4", "23034 MiB")]


def test_no_library_is_imported() -> None:
    code = "import sys, erasec.tensorrt.devices; print({'numpy', 'torch', 'onnx', 'pydantic'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
