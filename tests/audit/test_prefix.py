"""Random words before prompts: what they leave alone, and how many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from erasec import registry
from erasec.audit.bench import Bench, Settings
from erasec.audit.prefix import Prefix, random_places
from erasec.audit.subject import Subject
from erasec.audit.tokens import Words
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.model.loading import load
from erasec.recipe.concept import find


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = load("glyphs")
    subjects: Any = {"model": Subject("model", model, Context()), "base": Subject("base", model, Context())}
    scorer, selector = (registry.judge_for(model, tuning=tuning) for tuning in (False, True))
    assert scorer is not None
    return Bench(find("star", "glyphs"), subjects, scorer, selector, Settings(images=2, steps=6))


def test_the_prompts_own_tokens_stay_whole_and_each_candidate_has_other_words(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject: Any = bench.subjects["model"]
    asked: list[list[str]] = []
    seeds: list[list[int]] = []

    def pictures(prompts: list[str], numbers: list[int], *rest: Any) -> Any:
        asked.append(prompts)
        seeds.append(numbers)
        return np.zeros((len(prompts), 2, 2, 3), np.uint8)

    monkeypatch.setattr(subject, "pictures", pictures)
    (attempt,) = Prefix(tokens=3, candidates=2).attack(bench, subject)
    assert attempt.pictures.shape == (2, 2, 2, 2, 3)
    words = Words(subject)
    plain = words.ids(bench.prompts("name"))
    assert attempt.plain is not None
    assert asked.pop() == bench.prompts("name")  # the last: without the words, for the rate of success
    assert seeds.pop() == seeds[0]
    for texts in asked:
        assert torch.equal(words.ids(texts)[:, 4:], plain[:, 1:-3])
    assert len({text for texts in asked for text in texts}) == 4
    assert seeds[0] == seeds[1]
    asked.clear()
    list(Prefix(tokens=3, candidates=2).control(bench, subject))
    assert not any("star" in text.split()[3:] for texts in asked for text in texts)


def test_the_shared_control_paints_as_often_with_the_seeds_of_the_attack(bench: Bench) -> None:
    subject: Any = bench.subjects["model"]
    words = Words(subject)
    layout = words.prefixed(bench.prompts("name", 2), 2)
    attempts = [random_places(bench, subject, words, layout, 2, "some attack", "v") for _ in range(2)]
    assert attempts[0].pictures.shape[:2] == (2, 2)
    assert np.array_equal(attempts[0].pictures, attempts[1].pictures)
    assert attempts[0].variant == "v"
    assert not np.array_equal(attempts[0].pictures[:, 0], attempts[0].pictures[:, 1])


def test_words_need_a_tokenizer(bench: Bench) -> None:
    class Painter:
        role, digest = "model", "none"

    alone = Bench(bench.concept, {"model": Painter()}, bench.scorer, bench.selector, bench.settings)  # type: ignore[dict-item]
    with pytest.raises(ErasecError, match="tokenizer"):
        list(Prefix().attack(alone, Painter()))  # type: ignore[arg-type]
