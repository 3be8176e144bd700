"""Bars are drawn by the main process, in a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from erasec.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "rank", "drawn"), [(Terminal(), "0", True), (Terminal(), "1", False), (io.StringIO(), "0", False)]
)
def test_when_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, rank: str, drawn: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("RANK", rank)
    with bar("solve", 2) as advance:
        advance(note="half")
    assert ("solve" in stderr.getvalue()) is drawn
