"""The tables of all passes in the documents are those of ``tests/benchmarks/passes_emoji.py``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def test_the_tables_of_the_documents_are_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "tests" / "benchmarks")
    benchmark = importlib.import_module("passes_emoji")
    result = json.loads(benchmark.RESULT.read_text(encoding="utf-8"))
    text = (root / "docs" / "emoji.md").read_text(encoding="utf-8")
    assert benchmark.table(result).strip() in text
    result["rows"]["owl"]["uce"]["shows"]["name"][0] += 20
    assert benchmark.table(result).strip() not in text


def test_questions_are_spread_over_all_that_is_erased(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "tests" / "benchmarks")
    benchmark = importlib.import_module("passes_emoji")
    for task, names in benchmark.TASKS.items():
        questions = benchmark.questions(task)
        asked = {question.looked_for for question in questions if question.group == "name"}
        assert len(asked) == min(len(names), benchmark.IMAGES)
        kept = {question.looked_for for question in questions if question.group not in ("name", "synonym", "implicit")}
        assert not asked & kept
    hundred = [question.looked_for for question in benchmark.questions("100 objects") if question.group == "name"]
    places = [benchmark.HUNDRED.index(name) for name in hundred]
    assert max(places) > 90 and places == sorted(places)
