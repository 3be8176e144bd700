"""Bars are for one person at a terminal: elsewhere, and in the processes that only help, nothing is drawn."""

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
def test_who_sees_a_bar(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, rank: str, drawn: bool) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("RANK", rank)
    with bar("solve", 2) as advance:
        advance(note="half")
    assert ("solve" in stderr.getvalue()) is drawn
