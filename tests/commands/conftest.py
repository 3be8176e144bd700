"""What several tests of commands need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def whole(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build for several targets. What its graphs compute is not compared with torch, which takes longest."""
    import forged  # which imports torch

    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erasec.targets.ort.compare_outputs", lambda *_, **__: ())
        patch.setattr("erasec.targets.ldm.read_back", lambda *_: ())
        forged.make(random_folder, out, targets=forged.TARGETS)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of a build that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "out"))
