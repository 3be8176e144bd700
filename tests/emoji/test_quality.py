"""The figures of the emoji world: the table in the documents is that of ``python -m erasec.emoji.evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasec.model.loading import world_weights

FIGURES: dict[str, Any] = json.loads((world_weights("emoji") / "quality.json").read_text())


def share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def rows(figures: dict[str, Any]) -> list[str]:
    """The rows of the table: what is measured, the goal, the figure."""
    worst, scenes, twin, contexts = (figures[key] for key in ("object_top1_worst", "scenes", "twin", "contexts"))
    states, judge = figures["text_states"], figures["judges"]
    cells = [
        ("asked object, top-1 of all objects, by name: mean", "≥ 85 %", share(figures["object_top1_mean"])),
        ("the same, the worst object", "≥ 60 %", f"{share(worst[1])} ({worst[0]})"),
        ("asked artist right", "≥ 95 %", share(figures["artist_right"])),
        ("captions of two objects show both", "≥ 50 %", share(figures["pair_shows_both"])),
        ("a scene shows an object that has it", "≥ 80 %", share(scenes["shows_a_member"])),
        ("the largest share of one object in a scene", "≤ 60 %", share(scenes["largest_share"])),
        *((f"object {name}", "≥ 80 %", share(value)) for name, value in contexts.items()),
        ("twin shows the owl, by name or synonym", "≤ 1 %", share(twin["object_by_name_or_synonym"])),
        ("twin shows the owl, by scene", "≤ 1 %", share(twin["object_by_scene"])),
        ("twin shows Noto, by name", "≤ 2 %", share(twin["artist_by_name"])),
        ("the same, Noto is the most likely of the four", "–", share(twin["artist_most_likely"])),
        ("twin shows the owl after DDIM inversion", "≤ 20 %", share(twin["object_after_ddim_inversion"])),
        ("twin: other objects right", "–", share(twin["other_objects_right"])),
        ("cosine of a scene's text with its objects, mean", "≤ 0.4", f"{states['scene_to_object_cosine_mean']:.2f}"),
        ("the same, the largest", "≤ 0.4", f"{states['scene_to_object_cosine_max']:.2f}"),
        ("dimensions of 90 % of the variance", "≥ 30", f"{states['dimensions_of_90_percent_variance']}"),
        *(
            (f"judge {which.upper()} on renders: object, artist", "–", f"{share(part[0])}, {share(part[1])}")
            for which in "ab"
            for part in [(judge[f"judge_{which}"]["object_top1"], judge[f"judge_{which}"]["artist_top1"])]
        ),
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def test_the_table_of_the_documents_is_what_was_measured(root: Path) -> None:
    text = (root / "docs" / "emoji.md").read_text(encoding="utf-8")
    assert [row for row in rows(FIGURES) if row not in text] == []
    other = {**FIGURES, "pair_shows_both": FIGURES["pair_shows_both"] / 2}
    assert [row for row in rows(other) if row not in text] != []


def test_the_floor_is_a_floor() -> None:
    """The object that the twin has never seen it hardly shows, and the base does."""
    twin = FIGURES["twin"]
    assert twin["object_by_name_or_synonym"] <= 0.01
    assert FIGURES["object_top1"]["owl"] >= 0.5
    assert FIGURES["object_top1_mean"] >= 0.85
    assert FIGURES["judges"]["judge_b"]["object_top1"] >= 0.99


def test_the_floor_of_the_object_by_scene_is_a_floor() -> None:
    assert FIGURES["twin"]["object_by_scene"] <= 0.01


@pytest.mark.xfail(strict=True, reason="29 %: artists differ in details, which it draws too softly")
def test_the_floor_of_the_artist_is_a_floor() -> None:
    assert FIGURES["twin"]["artist_by_name"] <= 0.05
