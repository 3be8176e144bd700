"""The graphs in the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint import store
from erasec.graphs import cache
from erasec.graphs.graph import Template, Weight

onnx = pytest.importorskip("onnx")
WEIGHT = Weight("a:transpose", "a", (2, 3), (1, 0), (3, 2), "float32")


def model(name: str = "graph") -> Any:
    return onnx.helper.make_model(onnx.helper.make_graph([], name, [], []))


def test_descriptive_keys_of_a_config_are_left_out() -> None:
    config = {"_name_or_path": "/somebody", "_class_name": "UNet", "architectures": [], "dtype": "float16", "layers": 2}
    assert cache.computing_config(config) == {"layers": 2}


class TestConvenience:
    """Without a usable cache, graphs are made for the process, and a note says why."""

    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "process_scratch", lambda: tmp_path / "scratch")
        monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
        store._note.cache_clear()

    @pytest.mark.parametrize("fault", ["full", "read-only", "a file", "no home"])
    def test_an_unusable_cache_is_noted_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
    ) -> None:
        words = {"full": "No space left", "read-only": "Read-only", "a file": "Not a directory", "no home": "home"}
        if fault == "a file":
            (tmp_path / "cache").touch()
        elif fault == "no home":
            monkeypatch.delenv("ERASEC_CACHE")
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setattr(Path, "home", lambda: None)
            monkeypatch.setattr(Path, "expanduser", self.no_home)
        else:
            number = {"full": 28, "read-only": 30}[fault]

            def refuse(kind: str, *_: object) -> None:
                raise OSError(number, os.strerror(number), kind)

            monkeypatch.setattr(store, "write_folder", refuse)
        made: list[str] = []

        def make() -> Any:
            made.append("")
            return model(), [WEIGHT]

        for _ in range(2):
            assert Template(cache.cached_graph("key", make), "").load().graph.name == "graph"
        note = capsys.readouterr().err
        assert len(made) == 1 and note.count("the cache cannot be used") == 1 and words[fault] in note

    @staticmethod
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    def test_a_usable_cache_is_used_in_silence(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cache.cached_graph("key", lambda: (model(), [WEIGHT])) == tmp_path / "cache" / "graphs" / "key"
        assert not (tmp_path / "scratch").exists() and capsys.readouterr().err == ""
