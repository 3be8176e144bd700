"""What every registered pass is given: concepts whose goals stay and differ from them, and texts that are not cut.

Passes come from the registry, so new ones are tested too. Nothing is solved: the tests look at what a pass gets.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from erasec import registry
from erasec.base import Context, Pass
from erasec.commands import build, plan
from erasec.errors import ErasecError
from erasec.model.view import Model
from erasec.recipe.concept import Concept
from erasec.recipe.goals import first_disputed
from erasec.recipe.recipe import NamedOptions, Recipe

PASSES = sorted(registry.passes())
CHURCH = Concept(name="church", erase=("church",), anchor="barn")
# An anchor that an earlier build erased, a chain, and a cycle; and where they lead.
DISPUTED = (
    Concept(name="lion", erase=("lion",), anchor="tiger", fallback=("dog",)),
    Concept(name="poodle", erase=("poodle",), anchor="a black cat"),
    Concept(name="cat", erase=("cat",), anchor="horse"),
    Concept(name="circle", erase=("circle",), anchor="square", fallback=("triangle",)),
    Concept(name="square", erase=("square",), anchor="circle"),
)
GOALS = {"lion": "dog", "poodle": "horse", "cat": "horse", "circle": "triangle", "square": ""}
LONG = " ".join("ab" * 45)  # short enough for the name of a file


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Concept]:
    """The concepts that passes get from builds, which no pass solves."""
    concepts: list[Concept] = []

    def solve_all(self: Pass, model: Model, given: Sequence[Concept], context: Context) -> Iterator[Any]:
        concepts.extend(given)
        return iter(())

    for name in PASSES:
        monkeypatch.setattr(registry.load_pass(name), "solve_all", solve_all)
    return concepts


@pytest.fixture(scope="module")
def without_tiger(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model from which a build erased the tiger."""
    root = tmp_path_factory.mktemp("earlier")
    shutil.copytree(random_folder, root / "hf", copy_function=os.link)
    tiger = Concept(name="tiger", erase=("tiger",)).model_dump(mode="json")
    report = {"schema": "erasec.report/1", "written": [{"path": "hf"}], "concepts": [tiger]}
    (root / "report.json").write_text(json.dumps(report))
    return root / "hf"


def solve(name: str, model: Path | str, *concepts: Concept | str, out: Path, **options: str) -> plan.Plan:
    """The plan of a build with the pass ``name``, after its solving."""
    own = tuple(concept for concept in concepts if isinstance(concept, Concept))
    names = tuple(concept.name if isinstance(concept, Concept) else concept for concept in concepts)
    use = NamedOptions(name=name, options=dict(options))
    text: dict[str, Any] = {"model": str(model), "erase": names, "concept": own, "pass": (use,), "device": "cpu"}
    resolved = plan.make_plan(Recipe(**text), out, pin=False)
    build._solve(resolved, out)
    return resolved


def disputed(concepts: Sequence[Concept], earlier: Sequence[Concept] = ()) -> list[str]:
    """The names of the concepts with a goal that is erased."""
    erased = [phrase for concept in (*concepts, *earlier) for phrase in concept.phrases]
    return [concept.name for concept in concepts if first_disputed(concept.goals, erased)]


@pytest.mark.parametrize("name", PASSES)
def test_the_goals_that_a_pass_gets_are_not_erased(
    name: str, handed: list[Concept], without_tiger: Path, tmp_path: Path
) -> None:
    resolved = solve(name, without_tiger, *DISPUTED, out=tmp_path / "out")
    assert tuple(handed) == resolved.concepts
    assert {concept.name: concept.anchor for concept in handed} == GOALS
    assert disputed(handed, resolved.earlier) == []


def test_without_resolving_passes_would_get_goals_that_are_erased(
    handed: list[Concept], without_tiger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "resolve_goals", lambda concepts, earlier: (tuple(concepts), ()))
    resolved = solve("uce", without_tiger, *DISPUTED, out=tmp_path / "out")
    assert disputed(handed, resolved.earlier) == ["lion", "poodle", "circle", "square"]


def same(phrase: str, goal: str) -> Concept:
    return Concept(name="same", erase=("thing", phrase), counterparts=((phrase, goal),))


@pytest.mark.parametrize("name", PASSES)
def test_a_concept_that_reads_as_its_goal_is_an_error_beside_others(
    name: str, handed: list[Concept], random_folder: Path, tmp_path: Path
) -> None:
    """Different texts, the same tokens: the pass could not change this concept, and would change the other one."""
    for concepts in ((same("r2d2", "r 2 d 2"),), (CHURCH, same("r2d2", "r 2 d 2"))):
        with pytest.raises(ErasecError, match="the concept same becomes itself") as caught:
            solve(name, random_folder, *concepts, out=tmp_path / "out")
        assert "'r 2 d 2'" in caught.value.why and "another anchor" in caught.value.fix
        assert handed == []


def test_tokens_decide_whether_a_goal_is_another_one(
    handed: list[Concept], random_folder: Path, tmp_path: Path
) -> None:
    for phrase, goal in (("caf\u00e9", "cafe\u0301"), ("ice_cream", "ice _ cream"), ("R2D2", "r2 d2")):
        with pytest.raises(ErasecError, match="the concept same becomes itself"):
            solve("uce", random_folder, CHURCH, same(phrase, goal), out=tmp_path / "out")
    for phrase, goal in (("caf\u00e9", "cafe"), ("r2d2", "r2d3")):
        solve("uce", random_folder, CHURCH, same(phrase, goal), out=tmp_path / "out")
        assert [concept.name for concept in handed[-2:]] == ["church", "same"]


@pytest.mark.parametrize("name", PASSES)
def test_no_text_option_is_cut_in_silence(name: str, random_folder: Path, tmp_path: Path) -> None:
    """A text of 90 words is too long for a prompt, and names no file."""
    kind = registry.load_pass(name)
    hints = get_type_hints(kind)
    texts = [field.name for field in fields(kind) if hints[field.name] is str]  # type: ignore[arg-type]
    assert set(kind.prompt_options) <= set(texts)
    for option in texts:
        words = "is too long" if option in kind.prompt_options else "there is no "
        with pytest.raises(ErasecError, match=words):
            solve(name, random_folder, CHURCH, out=tmp_path / "out", **{option: LONG})
