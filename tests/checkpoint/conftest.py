"""A file in the state in which a killed in-place edit leaves it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from killed_edits import Disk, folder, interrupted, recover

from erasec.checkpoint import journal
from erasec.checkpoint import safetensors as checkpoint


@pytest.fixture
def blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose edit was interrupted when it was mixed."""
    for budget in range(0, 1000, 5):
        (file,) = folder(tmp_path)
        interrupted([file], Disk(budget), journal.patch_in_place, monkeypatch)
        if file.read_bytes()[:8] == checkpoint.BLANK:
            return file
        recover(file, Disk(math.inf), monkeypatch)
    raise AssertionError("no kill left a mixed file")
