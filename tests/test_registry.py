"""The registry: names become classes, other packages add their own, and every mistake is a clear error."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, get_args

import pytest

from erasec import registry
from erasec.base import Judge, Output, Pass, Runtime
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.options import configure
from erasec.recipe.concept import Concept

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from erasec.base import Pass
from erasec.model.edit import Edit

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "nothing"
    strength: float = 0.5

    def sites(self, model):
        return model.select("cross", "v")

    def solve(self, model, concept, context):
        return Edit({}, self.name, (concept.name,), model.digest)
"""


def register_entry_point(monkeypatch: pytest.MonkeyPatch, name: str, value: str, kind: str = "erasec.passes") -> None:
    """Let another package register ``name`` in the entry-point group ``kind``."""

    def points(group: str) -> EntryPoints:
        return EntryPoints([EntryPoint(name, value, group)] if group == kind else [])

    monkeypatch.setattr(registry, "entry_points", points)


def test_packages_that_register_classes_have_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = metadata.distribution("pydantic")  # any distribution stands for that of another package
    point = EntryPoint("mine", "their_package:Mine", "erasec.judges")._for(theirs)  # type: ignore[attr-defined]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "erasec.judges" else [])
    assert registry.distributions() == {"pydantic": theirs.version}


TABLES = {
    "pass": (Pass, registry.PASSES, registry.load_pass),
    "target": (Output, registry.TARGETS, registry.load_target),
    "judge": (Judge, registry.JUDGES, registry.load_judge),
    "runtime": (Runtime, registry.RUNTIMES, registry.load_runtime),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TABLES for name in sorted(TABLES[kind][1])])
def test_every_name_in_the_tables_loads(kind: str, name: str) -> None:
    base, _, load = TABLES[kind]
    cls: Any = load(name)
    assert issubclass(cls, base)
    assert cls.name == name
    assert cls.summary


def test_runtimes_are_listed_in_the_order_in_which_they_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(registry.runtimes()) == list(registry.RUNTIMES) != sorted(registry.RUNTIMES)
    register_entry_point(monkeypatch, "abacus", "their.module:Abacus", "erasec.runtimes")
    assert list(registry.runtimes()) == [*registry.RUNTIMES, "abacus"]
    assert list(registry.passes()) == sorted(registry.PASSES)


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
    register_entry_point(monkeypatch, "theirs", "erasec.passes.uce:Uce")
    assert registry.passes()["theirs"] == "erasec.passes.uce:Uce"
    assert registry.load_pass("theirs") is registry.load_pass("uce")
    assert "theirs" not in registry.targets()


def test_two_packages_with_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    register_entry_point(monkeypatch, "uce", "their.module:Uce")
    with pytest.raises(ErasecError, match="two passes are named 'uce'") as caught:
        registry.load_pass("uce")
    assert "their.module:Uce" in caught.value.why


def test_a_package_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    register_entry_point(monkeypatch, "theirs", "no_such_module_anywhere:X")
    with pytest.raises(ErasecError, match="'theirs' cannot be imported") as caught:
        registry.load_pass("theirs")
    assert "no_such_module_anywhere" in caught.value.why


def test_a_pass_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    kind = registry.load_pass(f"{file}:Mine")
    assert vars(configure(kind, {"strength": 2}, "mine")) == {"strength": 2.0}


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


JUDGE = """
from typing import ClassVar
import numpy as np
from erasec.base import Judge

class Blind(Judge):
    name: ClassVar[str] = "blind"
    summary: ClassVar[str] = "sees nothing"
    digest = "0" * 64

    @classmethod
    def for_model(cls, model, tuning=False):
        return None if tuning else cls()

    def panel(self, concept, images, seed):
        return ()

    def sees(self, images, labels):
        return np.zeros(len(images), bool)

    def agreement(self, images, prompts):
        return np.zeros(len(images))
"""


class TestJudgeFor:
    """The judge for a model: by name, or the first registered one that knows the model."""

    @pytest.fixture
    def blind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "blind_judge.py").write_text(JUDGE)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{tmp_path / 'blind_judge.py'}:Blind"

    def test_the_registered_judge_of_glyphs(self, random_folder: Path) -> None:
        glyphs, other = loading.load("glyphs"), loading.load(str(random_folder))
        judge, tuning = registry.judge_for(glyphs), registry.judge_for(glyphs, tuning=True)
        assert judge is not None and tuning is not None
        assert judge.name == tuning.name == "glyphs" and judge.digest != tuning.digest
        assert registry.judge_for(other) is None and registry.judge_for(other, tuning=True) is None

    def test_a_judge_of_another_package_judges_what_no_other_knows(
        self, random_folder: Path, blind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        register_entry_point(monkeypatch, "zblind", "blind_judge:Blind", "erasec.judges")
        judge = registry.judge_for(loading.load(str(random_folder)))
        assert judge is not None and judge.name == "blind"
        known = registry.judge_for(loading.load("glyphs"))
        assert known is not None and known.name == "glyphs"

    def test_a_named_judge_is_used_or_an_error(self, random_folder: Path, blind: str) -> None:
        model = loading.load(str(random_folder))
        judge = registry.judge_for(model, blind)
        assert judge is not None and judge.name == "blind"
        assert registry.judge_for(model, blind, tuning=True) is None
        with pytest.raises(ErasecError, match="the judge glyphs cannot judge pictures of") as caught:
            registry.judge_for(model, "glyphs")
        assert "erasec list judges" in caught.value.fix
        with pytest.raises(ErasecError, match="there is no judge 'glyhps'"):
            registry.judge_for(model, "glyhps")
