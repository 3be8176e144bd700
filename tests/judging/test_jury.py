"""A jury: each judge decides about its own concepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import clip_folder
import numpy as np
import pytest
from numpy.typing import NDArray

from erasec.base import Judge, Question
from erasec.commands.plan import describe, make_plan
from erasec.errors import ErasecError
from erasec.judging.jury import Jury, judge_of_build
from erasec.judging.panel import questions
from erasec.model import loading
from erasec.model.view import Model
from erasec.recipe.concept import Concept, find
from erasec.recipe.recipe import from_flags

A, B, C = (Concept(name=name, erase=(name,), keep=("all else",)) for name in "abc")
IMAGES = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)


class Level(Judge):
    """Sees its label in pictures of one brightness."""

    name = "level"
    summary = "a judge of one brightness"

    def __init__(self, label: str, level: int, agrees: float | None = None) -> None:
        self.label, self.level, self.agrees = label, level, agrees

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Level | None:
        return None

    @property
    def title(self) -> str:
        return f"level {self.level}"

    @property
    def digest(self) -> str:
        return f"{self.level:064x}"

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        return questions(concept, images, seed, self.label) if concept.name == self.label else ()

    def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
        assert set(labels) <= {self.label}
        return images[:, 0, 0, 0] == self.level

    def agreement(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64] | None:
        return None if self.agrees is None else np.full(len(images), self.agrees)


@pytest.fixture
def jury() -> Jury:
    return Jury({"a": Level("a", 1), "b": Level("b", 2, agrees=0.3)}, [A, B, C])


def test_each_label_goes_to_its_own_judge(jury: Jury) -> None:
    assert jury.sees(IMAGES, ["a"] * 4).tolist() == [False, True, False, False]
    assert jury.sees(IMAGES, ["b"] * 4).tolist() == [False, False, True, False]
    assert jury.sees(IMAGES, ["b", "a", "a", "b"]).tolist() == [False, True, False, False]
    assert not jury.sees(IMAGES, ["", "c", "", "c"]).any()
    assert jury.sees(IMAGES[:0], []).shape == (0,)


def test_each_concept_has_the_questions_of_its_judge(jury: Jury) -> None:
    assert {item.looked_for for item in jury.panel(A, 1, 0)} == {"a", ""}
    assert {item.looked_for for item in jury.panel(B, 1, 0)} == {"b", ""}
    assert jury.panel(C, 1, 0) == ()


def test_the_first_judge_that_compares_pictures_with_prompts_does(jury: Jury) -> None:
    assert jury.agreement(IMAGES, ["x"] * 4) == pytest.approx(0.3)
    assert Jury({"a": Level("a", 1)}, [A]).agreement(IMAGES, ["x"] * 4) is None


def test_it_is_all_of_its_judges(jury: Jury) -> None:
    assert jury.title == "level 1; level 2"
    other = Jury({"a": Level("a", 1), "b": Level("b", 3)}, [A, B])
    assert len(jury.digest) == 64 and jury.digest != other.digest
    assert not jury.locates
    with pytest.raises(ErasecError, match="cannot locate"):
        jury.boxes(IMAGES, "a")


def test_a_judge_of_the_model_has_the_rest() -> None:
    """In glyphs, nudenet looks for nudity if it is named; shapes and colours stay with the judge of glyphs."""
    glyphs = loading.load("glyphs")
    judge, remarks = judge_of_build(glyphs, [find("star", "glyphs"), find("nudity")], ["nudenet"])
    assert isinstance(judge, Jury) and remarks == ()
    assert [member.name for member in judge.judges] == ["glyphs", "nudenet"]
    own = loading_judge(glyphs)
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    assert judge.sees(images, ["star", "red"]).tolist() == own.sees(images, ["star", "red"]).tolist()
    assert not judge.sees(images, ["nudity", "nudity"]).any()
    assert {q.looked_for for q in judge.panel(find("nudity"), 1, 0) if q.group == "name"} == {"nudity"}


def loading_judge(model: Model) -> Judge:
    judge, _ = judge_of_build(model, [find("star", "glyphs")])
    assert judge is not None
    return judge


def test_one_judge_needs_no_jury(random_folder: Path) -> None:
    glyphs = loading.load("glyphs")
    assert loading_judge(glyphs).title == "glyphs judge B"
    judge, _ = judge_of_build(loading.load(str(random_folder)), [find("nudity")])
    assert judge is not None and judge.name == "nudenet"


def test_a_second_judge_compares_pictures_with_prompts_where_the_first_cannot(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nudenet decides, and clip gives the CLIP score. Where clip decides, nothing else is needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    clip = f"clip:folder={clip_folder.write(clip_folder.small_clip(), tmp_path / 'small')}"
    model, nudity = loading.load(str(random_folder)), find("nudity")
    alone, _ = judge_of_build(model, [nudity])
    assert alone is not None and alone.name == "nudenet" and not alone.compares
    assert alone.agreement(IMAGES, ["x"] * 4) is None
    both, _ = judge_of_build(model, [nudity], ["nudenet", clip])
    assert isinstance(both, Jury) and both.compares and both.members["nudity"].name == "nudenet"
    agreement = both.agreement(IMAGES, ["x"] * 4)
    assert agreement is not None and agreement.shape == (4,)
    assert both.title.startswith("nudenet ") and "; clip small" in both.title and both.digest != alone.digest
    other, _ = judge_of_build(model, [nudity], [clip, "nudenet"])
    assert other is not None and other.name == "clip"


def test_a_plan_has_the_judge_and_says_what_is_missing(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = from_flags(str(random_folder), ["nudity"], judge=["nudenet:at=0.6"])
    plan = make_plan(recipe, tmp_path / "out", pin=False)
    assert plan.judge is not None and "from 0.6" in describe(plan)["judge"]
    assert plan.context.judges == ("nudenet:at=0.6",)
    monkeypatch.setattr("erasec.judges.nudenet.weights_file", lambda: None)
    plan = make_plan(from_flags(str(random_folder), ["nudity"]), tmp_path / "out", pin=False)
    assert plan.judge is None
    line = 'nudity could be judged by nudenet: pip install "erasec[nudenet]"'
    assert any(note.startswith(line) for note in describe(plan)["notes"])
