"""The measurement of a device, and its place in the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from erasec.commands import speed
from erasec.commands.speed import ASSUMED, FASTER, SLOWER, Speed, bounds, identity, known


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "SECONDS", 0.02)
    return tmp_path / "cache"


def test_a_measurement_is_kept_for_this_device(cache: Path) -> None:
    assert known("cpu") is None
    slow, fast, how = bounds("cpu")
    assert (slow, fast) == ASSUMED["cpu"]
    assert "not measured on this machine: erasec doctor --measure" in how
    measured = speed.measure("cpu")
    assert all(value > 0 for value in asdict(measured).values())
    assert known("cpu") == measured
    slow, fast, how = bounds("cpu")
    assert slow.operations == measured.operations * SLOWER and fast.operations == measured.operations * FASTER
    assert slow.layer == measured.layer / SLOWER
    assert "measurement" in how


def test_a_measurement_of_another_machine_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed.measure("cpu")
    monkeypatch.setenv("ERASEC_THREADS", "3")
    assert known("cpu") is None
    speed.measure("cpu")
    assert len(json.loads((cache / speed.FILE).read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"NAME": 3}', '{"NAME": {"operations": 1}}', '{"NAME": ZERO}'])
def test_an_unusable_cache_is_no_error(cache: Path, content: str) -> None:
    cache.mkdir()
    zero = json.dumps(asdict(Speed(0, 1, 1, 1)))
    (cache / speed.FILE).write_text(content.replace("NAME", identity("cpu")).replace("ZERO", zero))
    assert known("cpu") is None
    speed.measure("cpu")
    assert known("cpu") is not None


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "file"))
    assert speed.measure("cpu").operations > 0
    assert known("cpu") is None
