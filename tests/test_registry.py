from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import get_args

import pytest

from erasec import registry
from erasec.base import Output, Pass, with_options
from erasec.errors import ErasecError
from erasec.recipe.concept import Concept

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from erasec.base import Pass
from erasec.model.edit import Edit

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "nothing"
    strength: float = 0.5

    def sites(self, model):
        return model.select("cross", "v")

    def solve(self, model, concept, context):
        return Edit({}, self.name, concept.name)
"""


def registered(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    def points(group: str) -> EntryPoints:
        return EntryPoints([EntryPoint(name, value, group)] if group == "erasec.passes" else [])

    monkeypatch.setattr(registry, "entry_points", points)


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_every_pass_in_the_table_loads_under_its_own_name(name: str) -> None:
    found = registry.load_pass(name)
    assert issubclass(found, Pass)
    assert found.name == name
    assert found.summary


@pytest.mark.parametrize("name", sorted(registry.TARGETS))
def test_every_target_in_the_table_loads_under_its_own_name(name: str) -> None:
    found = registry.load_target(name)
    assert issubclass(found, Output)
    assert found.name == name
    assert found.summary


def test_names_are_known_without_importing_anything() -> None:
    code = "import sys; from erasec import registry; registry.passes(), registry.targets(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "erasec.registry" in loaded
    assert not {"torch", "erasec.passes.uce", "erasec.targets.ort"} & set(loaded)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ErasecError, match="no pass 'ucee'") as caught:
        registry.load_pass("ucee")
    assert caught.value.why == "did you mean 'uce'?"
    with pytest.raises(ErasecError) as caught:
        registry.load_target("onxn")
    assert caught.value.why == "did you mean 'onnx'?"


def test_another_package_adds_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "theirs", "erasec.passes.uce:Uce")
    assert registry.passes()["theirs"] == "erasec.passes.uce:Uce"
    assert registry.load_pass("theirs") is registry.load_pass("uce")
    assert "theirs" not in registry.targets()


def test_a_clash_of_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "uce", "their.module:Uce")
    with pytest.raises(ErasecError, match="two passes are named 'uce'") as caught:
        registry.load_pass("uce")
    assert "their.module:Uce" in caught.value.why


def test_a_broken_package_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "theirs", "no_such_module_anywhere:X")
    with pytest.raises(ErasecError, match="'theirs' cannot be imported") as caught:
        registry.load_pass("theirs")
    assert "no_such_module_anywhere" in caught.value.why


def test_a_pass_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    kind = registry.load_pass(f"{file}:Mine")
    assert vars(with_options(kind, {"strength": 2}, "mine")) == {"strength": 2.0}


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (MINE, "Mime", ("'Mime' is no Pass", "did you mean 'Mine'?")),
        (MINE, "Pass2", ("'Pass2' is no Pass",)),
        ("x = 1", "x", ("'x' is no Pass", "has no subclass")),
        ("1 / 0", "X", ("cannot be imported", "ZeroDivisionError")),
        (None, "X", ("there is no file",)),
    ],
)
def test_a_file_without_the_pass(tmp_path: Path, content: str | None, name: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ErasecError) as caught:
        registry.load_pass(f"{file}:{name}")
    for word in words:
        assert word in str(caught.value)


def test_a_target_is_no_pass() -> None:
    file = registry.load_target("hf").__module__
    with pytest.raises(ErasecError, match="'Hf' is no Pass"):
        registry.load_pass(f"{sys.modules[file].__file__}:Hf")


def test_every_kind_of_concept_has_a_pass() -> None:
    kinds = get_args(Concept.model_fields["kind"].annotation)
    assert set(registry.DEFAULTS) == set(kinds) and len(kinds) == 6
    assert set(registry.DEFAULTS.values()) <= set(registry.passes())
