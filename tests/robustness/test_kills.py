"""The sweep of kills, a small share of it: see kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from robustness import kills

from erasec.checkpoint import manifest


@pytest.mark.slow
def test_kills_leave_the_old_or_the_new_and_nothing_else(tmp_path: Path) -> None:
    records = kills.sweep(tmp_path, 16)
    assert [record for record in records if record["fault"]] == []


def test_a_mixture_is_neither_the_old_nor_the_new(tmp_path: Path) -> None:
    for name, text in (("old", "a"), ("new", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(text)
        (tmp_path / name / "y").write_text(text)
    (tmp_path / "old" / "y").write_text("b")
    assert len({kills.digest(tmp_path / name) for name in ("old", "new", "missing")}) == 3
    assert kills.digest(tmp_path / "missing") == ""


def test_a_folder_that_differs_from_its_manifest_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert kills.is_whole(tmp_path)
    manifest.write(tmp_path)
    assert kills.is_whole(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    assert not kills.is_whole(tmp_path)
