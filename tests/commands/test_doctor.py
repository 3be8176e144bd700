"""``erasec doctor``: what is missing, and the command that installs it."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from erasec.commands import doctor


def test_missing_packages_are_reported_with_the_command_that_installs_them(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    findings = {item.name: item for item in doctor.examine(here)}
    assert findings["torch"].available
    assert findings["torch"].fix == ""
    assert findings["hub"].available
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = {item.name: item for item in doctor.examine(here)}
    assert findings["onnx"].fix == 'pip install "erasec[onnx]"'
    assert not findings["onnx"].required
    assert findings["torch"].required
    assert not findings["torch"].available
    assert "HF_HUB_OFFLINE" in findings["hub"].detail


def test_a_cuda_build_of_torch_is_recognised_without_loading_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    spec = namedtuple("spec", "origin")(str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "_devices", lambda: "H200, 143771 MiB")
    assert doctor._cuda() == doctor.Finding("cuda", True, "H200, 143771 MiB; torch is built for CUDA 13.0")
    monkeypatch.setattr(doctor, "_devices", lambda: "")
    assert not doctor._cuda().available
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert "CPU build" in doctor._cuda().detail
