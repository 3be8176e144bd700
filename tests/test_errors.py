"""Messages hold what a terminal can show, and no more than a person reads."""

from __future__ import annotations

import pytest

from erasec.errors import LONGEST, ErasecError, printable, shown


@pytest.mark.parametrize("part", ["what", "why", "fix", "where"])
def test_a_message_has_no_control_characters_and_no_line_of_its_own(part: str) -> None:
    parts = {"what": "x", part: "a\x1b[31mred\x07\x9b\n\r error: b\u202e\u2028\udc80"}
    text = str(ErasecError(**parts))
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.count("\n") == (part != "what")
    assert "a\\x1b[31mred\\x07\\x9b\\n\\r error: b\\u202e\\u2028\\udc80" in text


def test_words_of_any_language_stay_as_they_are() -> None:
    text = 'naïve 星 ★ don\'t \\ "x"'
    assert printable(text) == text
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_long_part_loses_its_middle() -> None:
    text = str(ErasecError("begin" + "x" * 10_000 + "end", why="short"))
    assert text.startswith("error: begin") and text.endswith("end\n  why: short")
    assert len(text) < LONGEST + 100


def test_a_value_is_quoted_and_short() -> None:
    assert shown("star") == "'star'"
    assert len(shown(["x" * 500] * 500)) < 100
