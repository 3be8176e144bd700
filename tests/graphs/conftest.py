"""A checkpoint for tests of graphs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def base(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to change."""
    return Path(shutil.copytree(random_folder, tmp_path / "base"))
