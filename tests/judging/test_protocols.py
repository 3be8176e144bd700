"""What published protocols count is in the text of the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from erasec.base import Judge, Question
from erasec.judging.evidence import Evidence, judge_pictures
from erasec.judging.protocols import protocol_counts
from erasec.judging.validate import checks
from erasec.model.view import Model
from erasec.recipe.concept import Concept
from erasec.recipe.recipe import Limits


class Brightness(Judge):
    """Sees its label in bright pictures; a protocol counts their levels."""

    name = "brightness"
    summary = "a judge of brightness"
    digest = "0" * 64

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Brightness | None:
        return None

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        return ()

    def sees(self, images: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.bool_]:
        return images[:, 0, 0, 0] > 0

    def agreement(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.ones(len(images))

    def protocols(self, images: NDArray[np.uint8], label: str) -> Mapping[str, NDArray[np.int64]]:
        return {"levels (sum)": images[:, 0, 0, 0].astype(np.int64)} if label == "light" else {}


@pytest.fixture
def evidence() -> Evidence:
    questions = [Question(group, "a prompt", 1, "light") for group in ("name", "name", "synonym")]
    before, after = (np.array(levels, dtype=np.uint8)[:, None, None, None] for levels in ((5, 2, 9), (0, 1, 4)))
    shape = (3, 8, 8, 3)
    return judge_pictures(Brightness(), questions, np.broadcast_to(before, shape), np.broadcast_to(after, shape))


def test_counts_are_those_of_the_pictures_of_the_group(evidence: Evidence) -> None:
    assert protocol_counts(Brightness(), evidence, "name", "light") == ["levels (sum) 7 to 1"]
    assert protocol_counts(Brightness(), evidence, "synonym", "light") == ["levels (sum) 9 to 4"]
    assert protocol_counts(Brightness(), evidence, "name", "dark") == []


def test_checks_state_them(evidence: Evidence) -> None:
    results = {check.name: check for check in checks(evidence, Brightness(), Limits(), 0, "DDIM")}
    assert "light 50% of 100%, levels (sum) 7 to 1, 2 prompts" in results["erased/name"].how
    assert "levels (sum) 9 to 4" in results["erased/synonym"].how
