"""The cache of graphs: it never returns a part of one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from erasec.graphs import cache
from erasec.graphs.cache import is_whole, store
from erasec.graphs.graph import Template, Weight

onnx = pytest.importorskip("onnx")
WEIGHT = Weight("a:transpose", "a", (2, 3), (1, 0), (3, 2), "float32")


def model(name: str = "graph") -> Any:
    return onnx.helper.make_model(onnx.helper.make_graph([], name, [], []))


def test_descriptive_keys_of_a_config_are_left_out() -> None:
    config = {"_name_or_path": "/somebody", "_class_name": "UNet", "architectures": [], "dtype": "float16", "layers": 2}
    assert cache.computing_config(config) == {"layers": 2}


def test_environment_variables_set_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ERASEC_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "erasec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "erasec"


@pytest.mark.parametrize("name", ["model.onnx", "weights.json", "digest"])
def test_a_damaged_graph_is_not_whole_and_is_replaced(tmp_path: Path, name: str) -> None:
    root = tmp_path / "graph"
    store(root, model(), [WEIGHT])
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not is_whole(root)
    store(root, model(), [WEIGHT])
    assert is_whole(root)
    (root / name).unlink()
    assert not is_whole(root)


def test_the_first_of_two_stays_so_that_its_readers_can_go_on(tmp_path: Path) -> None:
    root = tmp_path / "graph"
    store(root, model("first"), [WEIGHT])
    store(root, model("second"), [])
    assert Template(root, "").load().graph.name == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_concurrent_writers_leave_one_whole_graph(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            list(pool.map(lambda _, number=number: store(tmp_path / f"{number}", model(), [WEIGHT]), range(8)))
            assert is_whole(tmp_path / f"{number}")
    assert len(list(tmp_path.iterdir())) == 10


def test_what_cannot_be_written_is_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="full"):
        store(tmp_path / "graph", model(), [WEIGHT])
    assert not list(tmp_path.iterdir())


class TestConvenience:
    """Without a usable cache, graphs are made for the process, and a note says why."""

    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "process_scratch", lambda: tmp_path / "scratch")
        monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
        cache._note.cache_clear()

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

            def refuse(root: Path, *_: object) -> None:
                if root.is_relative_to(tmp_path / "cache"):
                    raise OSError(number, os.strerror(number), str(root))
                store(root, *_)

            monkeypatch.setattr(cache, "store", refuse)
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
