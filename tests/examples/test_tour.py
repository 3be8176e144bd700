"""examples/tour.ipynb: its cells run in their order, and the outputs that it holds are those of such a run."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def cells(root: Path) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((root / "examples/tour.ipynb").read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return [{**cell, "source": "".join(cell["source"])} for cell in content["cells"]]


def printed(cell: dict[str, Any]) -> str:
    """What a cell printed when the notebook was executed."""
    return "".join("".join(item["text"]) for item in cell["outputs"] if item["output_type"] == "stream")


def test_it_is_executed_in_one_go_and_small(root: Path, cells: list[dict[str, Any]]) -> None:
    assert (root / "examples/tour.ipynb").stat().st_size < 500_000
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [item for cell in code for item in cell["outputs"]]
    assert sum("image/png" in item.get("data", {}) for item in outputs) == 2
    assert not [item for item in outputs if item["output_type"] == "error" or item.get("name") == "stderr"]
    assert not re.search(r"/(tmp|home|root|work|Users)/", (root / "examples/tour.ipynb").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_its_cells_run_and_say_what_they_said(
    cells: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # so that what the notebook sets is taken back
        monkeypatch.delenv(name)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stdout, warnings.catch_warnings():
            exec(compile(ast.parse(cell["source"]), "tour.ipynb", "exec"), names)
        assert stdout.getvalue() == printed(cell), cell["source"]
    before, after = (names[name].tobytes() for name in ("before", "after"))
    assert before != after and len(before) == len(after)
