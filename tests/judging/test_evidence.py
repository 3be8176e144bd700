"""Evidence where a judge sees some concepts, or none: what is asked, what counts, and what is only shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erasec.attention.sampling import Sampling
from erasec.base import Check, Judge, Question
from erasec.glyphs.judge import GlyphJudge
from erasec.judging import evidence, validate
from erasec.judging.evidence import Evidence, collect_questions, gather_evidence, judge_pictures, rates
from erasec.recipe import concept
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits

STAR, CHURCH = concept.find("star", "glyphs"), concept.find("church")
OWL = Concept(name="owl", erase=("owl",), keep=("robin", "a church", "owlet"))
NOISE = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


def by_concept(asked: dict[Question, str]) -> set[tuple[str, str, str]]:
    return {(name, question.group, question.looked_for and "label") for question, name in asked.items()}


def test_without_a_judge_every_concept_has_plain_questions() -> None:
    asked = collect_questions(None, [CHURCH], 16, 2, 0)
    assert by_concept(asked) == {("church", group, "") for group in ("name", "synonym", "implicit", "keep")}
    assert len(asked) == 8
    assert collect_questions(None, [CHURCH], 16, 0, 0) == {}


def test_a_concept_that_the_judge_does_not_see_is_shown_next_to_one_that_it_sees() -> None:
    judge = GlyphJudge()
    asked = collect_questions(judge, [STAR, CHURCH], 3, 2, 0)
    alone = collect_questions(judge, [STAR], 3, 2, 0)
    assert list(asked)[: len(alone)] == list(alone)  # what the judge looks for does not change
    assert all(question.looked_for for question in alone)
    unseen = {question.group for question, name in asked.items() if name == "church" and not question.looked_for}
    assert unseen == {"name", "synonym", "implicit"}  # the judge has its own questions about the rest


def test_prompts_to_keep_do_not_name_what_another_concept_erases() -> None:
    kept = [question.prompt for question in collect_questions(None, [OWL, CHURCH], 3, 3, 0) if question.group == "keep"]
    assert "robin" in kept and not any("a church" in prompt for prompt in kept)
    alone = [question.prompt for question in collect_questions(None, [OWL], 3, 3, 0) if question.group == "keep"]
    assert len(alone) == 3  # its own name is the matter of its author, and "owlet" is no owl
    assert len([q for q in collect_questions(None, [OWL], 3, 3, 0, earlier=[CHURCH]) if q.group == "keep"]) == 2


class Strict(Judge):
    """Knows the label "star", which it sees everywhere, and refuses any other; it compares no pictures with prompts."""

    name = "strict"
    summary = "a judge of a test"
    digest = "ab" * 32

    @classmethod
    def for_model(cls, model: Any, tuning: bool = False) -> Strict:
        return cls()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        return ()

    def sees(self, images: Any, labels: Sequence[str]) -> Any:
        assert set(labels) == {"star"} and len(images) == len(labels)
        return np.ones(len(images), dtype=bool)

    def agreement(self, images: Any, prompts: Sequence[str]) -> Any:
        return None


QUESTIONS = (
    Question("name", "a star", 1, "star"),
    Question("name", "a church", 2, ""),
    Question("keep", "a cat", 3, ""),
)


def seen(judge: Judge | None = None) -> Evidence:
    return replace(judge_pictures(judge, QUESTIONS, NOISE[:3], NOISE[3:6]), sampling=Sampling(4, 3.0, "cpu", side=64))


def test_a_question_without_a_label_counts_in_no_hit_rate() -> None:
    found = seen(Strict())
    assert found.shown_before.tolist() == found.shown_after.tolist() == [True, False, False]
    assert found.labelled.tolist() == [True, False, False] and np.isnan(found.agreement_after).all()
    assert rates(found, "name") == [{"group": "name", "looked_for": "star", "images": 1, "before": 1.0, "after": 1.0}]
    assert rates(found, "keep") == []
    checks = {check.name: check for check in validate.checks(found, Strict(), Limits(), 0, "DDIM")}
    assert checks.keys() == {"pictures/finite", "erased/name", "kept/drift"}
    assert checks["erased/name"].value == 1.0 and "1 prompts" in checks["erased/name"].how
    assert not seen().shown_before.any() and not seen().labelled[1:].any()


def test_pictures_that_no_judge_sees_must_be_pictures() -> None:
    def by_name(evidence: Evidence) -> dict[str, Check]:
        return {check.name: check for check in validate.checks(evidence, None, Limits(), 0, "DDIM")}

    whole = replace(seen(), questions=tuple(replace(question, looked_for="") for question in QUESTIONS))
    check = by_name(whole)["pictures/finite"]
    assert (check.name, check.value, check.limit, check.passed) == ("pictures/finite", 0.0, 0.0, True)
    for fact in ("no judge", "4 DDIM steps", "guidance 3", "8 x 8 pixels", "float32 on cpu", "3 prompts"):
        assert fact in check.how
    for level in (0, 255, 90):  # NaN is black; a decoder of zeros is grey
        after = whole.after.copy()
        after[1] = level
        blank = by_name(replace(whole, after=after))["pictures/finite"]
        assert not blank.passed and blank.value == pytest.approx(1 / 3) and "0% before and 33% after" in blank.how


def test_the_time_that_ran_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(base: Path, built: Path, questions: Sequence[Question], *more: Any) -> Any:
        return [0, 5], NOISE[:2], NOISE[2:4]

    monkeypatch.setattr(evidence, "paint_pairs", short)
    found = gather_evidence(None, [CHURCH], Path(), Path(), 9, 0, Sampling(2, 1.0), pictures=2, minutes=1.0)
    assert found is not None and found.left_out == 6 and found.concepts == ("church", "church")
    assert [question.group for question in found.questions] == ["name", "implicit"]
    assert np.array_equal(found.before, NOISE[:2]) and np.array_equal(found.after, NOISE[2:4])


def test_artifacts_are_compared_by_pictures_with_a_label() -> None:
    assert validate.compared(seen()).tolist() == [0]
    assert validate.compared(replace(seen(), questions=QUESTIONS[1:])).tolist() == []
