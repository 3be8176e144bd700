"""The README says what was measured: its table is the committed result, and the result keeps its promises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from erasec.glyphs import world

LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "tests/benchmarks/results/uce_glyphs.json").read_text())["rows"]
    return found


def cells(row: dict[str, Any]) -> str:
    groups = ("name", "synonym", "implicit", "keep")
    parts = [f"{row[g][0]:.0%} → {row[g][1]:.0%}".replace("%", " %") if g in row else "–" for g in groups]
    return " | ".join(parts)


def test_the_table_is_the_result(root: Path, rows: dict[str, Any]) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert set(rows) == set(world.SHAPES)
    for shape, row in rows.items():
        over = "" if all(row["within"].values()) else " (over a limit)"
        assert f"| {shape}{over} | {cells(row)} |" in readme, shape
    assert "@@" not in readme


def test_star_is_within_its_limits_and_at_most_two_shapes_are_not(rows: dict[str, Any]) -> None:
    within = {
        shape: row["name"][1] <= 0.10 * row["name"][0]
        and row["synonym"][1] <= 0.10 * row["synonym"][0]
        and row["keep"][0] - row["keep"][1] <= 0.05
        for shape, row in rows.items()
    }
    assert within["star"]
    assert sum(not good for good in within.values()) <= 2
    assert within == {shape: all(row["within"].values()) for shape, row in rows.items()}


@pytest.mark.parametrize("page", ["README.md", "docs/glyphs.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(root: Path, page: str) -> None:
    text = (root / page).read_text(encoding="utf-8")
    links = LINK.findall(text)
    assert links
    assert not [link for link in links if not ((root / page).parent / link).exists()]
    assert "@@" not in text
