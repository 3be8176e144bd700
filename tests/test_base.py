"""The classes that people extend: what they do by default, and how checks are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from erasec.base import Check, Context, EditTarget, Judge, Output, Pass, Runtime, Target
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.edit import Edit
from erasec.recipe.concept import Concept


@pytest.mark.parametrize(
    ("value", "limit", "passed", "outcome"),
    [
        (1.0, 2.0, True, "passed"),
        (2.0, 2.0, True, "passed"),
        (2.1, 2.0, False, "failed"),
        (float("inf"), 2.0, False, "failed"),
        (float("nan"), 2.0, False, "failed"),
        (1e9, None, True, "reported"),
    ],
)
def test_a_check_of_a_largest_value(value: float, limit: float | None, passed: bool, outcome: str) -> None:
    check = Check.at_most("kept/drift", value, limit, "mean change")
    assert (check.name, check.limit, check.how) == ("kept/drift", limit, "mean change")
    assert (check.passed, check.outcome) == (passed, outcome)


def test_a_check_that_counts_names_the_first_fault() -> None:
    good = Check.count("files", [], "files that differ")
    assert good == Check("files", 0.0, 0.0, True, "files that differ")
    bad = Check.count("files", ["b.txt", "a.txt"], "files that differ")
    assert bad == Check("files", 2.0, 0.0, False, "files that differ; the first is b.txt")
    assert (good.outcome, bad.outcome) == ("passed", "failed")


def test_a_failed_check_without_a_limit_is_failed() -> None:
    assert Check("finite", 1.0, None, False, "").outcome == "failed"


@dataclass(frozen=True)
class Solved(Pass):
    """Records which edits each concept was solved after."""

    name: ClassVar[str] = "solved"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "an empty edit"

    def sites(self, model: Any) -> tuple[Any, ...]:
        return ()

    def solve(self, model: Any, concept: Concept, context: Context) -> Edit:
        before = ",".join(name for edit in model.edits for name in edit.concepts)
        return Edit({}, self.name, (concept.name,), before)


@dataclass(frozen=True)
class Recorder:
    """As much of a model as ``Pass.solve_all`` needs."""

    edits: tuple[Edit, ...] = ()

    def with_edit(self, edit: Edit) -> Recorder:
        return Recorder((*self.edits, edit))


def test_several_concepts_are_solved_one_after_the_other() -> None:
    concepts = [Concept(name=name, erase=(name,)) for name in ("star", "ring", "heart")]
    edits: list[Edit] = list(Solved().solve_all(Recorder(), concepts, Context()))  # type: ignore[arg-type]
    assert [edit.concepts for edit in edits] == [("star",), ("ring",), ("heart",)]
    assert [edit.base for edit in edits] == ["", "star", "star,ring"]


def test_the_size_of_an_output_is_by_default_that_of_all_weights_in_float32(random_folder: Path) -> None:
    class Plain(Output):
        pass

    model = loading.load(str(random_folder))
    count = sum(
        int(np.prod(entry.shape)) for name in model.family.components for entry in model.source.entries(name).values()
    )
    assert Plain().size(model) == 4 * count
    Plain().check()
    Plain().accept(model.sites)


class Blind(Judge):
    name: ClassVar[str] = "blind"
    summary: ClassVar[str] = "sees nothing"
    digest = "0" * 64

    @classmethod
    def for_model(cls, model: Any, tuning: bool = False) -> Blind | None:
        return cls()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Any, ...]:
        return ()

    def sees(self, images: Any, labels: Any) -> Any:
        return np.zeros(len(images), bool)

    def agreement(self, images: Any, prompts: Any) -> Any:
        return np.zeros(len(images))


def test_a_judge_that_cannot_locate_labels_says_so() -> None:
    judge = Blind()
    assert judge.title == "blind"
    with pytest.raises(ErasecError, match="the judge blind cannot locate a label") as caught:
        judge.boxes(np.zeros((1, 8, 8, 3), np.uint8), "star")
    assert "another judge" in caught.value.fix


@pytest.mark.parametrize("kind", [Pass, Target, EditTarget, Judge, Runtime])
def test_a_class_with_methods_to_define_cannot_be_used_as_it_is(kind: type) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()
