"""Small files that are damaged or made to harm are errors in words, within a second."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict
from typing_extensions import TypedDict

from erasec import documents
from erasec.documents import Source, parse_json, parse_toml, read_csv, read_json, read_text, read_toml
from erasec.errors import ErasecError

HERE = Source("the file", "x")
DEEP = 100_000


class Shop(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: str
    sold: dict[str, documents.Count]


def test_content_comes_back_as_it_is() -> None:
    content = {"name": "a", "sold": {"b": 1}, "more": [1.5, None]}
    assert parse_json(json.dumps(content), Shop, HERE) == content
    assert parse_toml('a.b = [1, "c"]', HERE) == {"a": {"b": [1, "c"]}}
    nested: Any = []
    for _ in range(documents.DEEPEST - 1):
        nested = [nested]
    assert parse_json(json.dumps(nested), list[Any], HERE) == nested


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sold": {}}, "it has no 'name'"),
        ({"name": 1, "sold": {}}, "name: it should be a valid string"),
        ({"name": "a", "sold": {"b": -1}}, "sold.b: it should be greater than or equal to 0"),
        ({"name": "a", "sold": {"b": True}}, "sold.b: it should be a valid integer"),
        ([], "it should be an object"),
    ],
)
def test_another_content_names_its_key(content: Any, words: str) -> None:
    with pytest.raises(ErasecError, match="the file cannot be read") as caught:
        parse_json(json.dumps(content), Shop, HERE)
    assert caught.value.why == words


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "[" * 100 + "]" * 100,
        "x = " + "[" * DEEP + "]" * DEEP,
        "x = " + "{a=" * 5000 + "1" + "}" * 5000,
        "a." * DEEP + "b = 1",
        '"a b" . ' * DEEP + "b = 1",
        "[" + "a." * 100 + "b]",
    ],
)
def test_deep_nesting_is_an_error_at_once(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(ErasecError, match="nested more than 48"):
        parse_toml(text, HERE) if "=" in text or "." in text else parse_json(text, list[Any], HERE)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["9" * 10_000 + "x", '{"a": 1', "", "nul", '{"a": "\n"}', "\ufeff1"])
def test_text_that_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(ErasecError, match="is not JSON") as caught:
        parse_json(text, dict[str, Any], HERE)
    assert "sys." not in caught.value.why


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe{\x00", "is not text in UTF-8 (byte 0)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(tmp_path: Path, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / "x").write_bytes(data)
    for read in (lambda p: read_json(p, dict[str, Any]), lambda p: read_toml(p, "the recipe"), read_text, read_csv):
        with pytest.raises(ErasecError) as caught:
            read(tmp_path / "x")
        assert words in str(caught.value)


def test_a_table_has_its_columns_and_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes('\ufeffa,b\r\n1, "2\r\n\n"x, y"\u2028,z,more\r3'.encode())
    assert read_csv(tmp_path / "x.csv") == (
        ("a", "b"),
        [{"a": "1", "b": '"2'}, {"a": "x, y", "b": "z"}, {"a": "3", "b": ""}],
    )
    (tmp_path / "x.csv").write_bytes(b"")
    assert read_csv(tmp_path / "x.csv") == ((), [])


@pytest.mark.parametrize(("data", "why"), [(b"a\nb\0\n", "NUL"), (b"a\n" + b"b" * 200_000, "field larger")])
def test_a_damaged_table_is_an_error(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(ErasecError, match=r"x\.csv cannot be read") as caught:
        read_csv(tmp_path / "x.csv")
    assert why in caught.value.why


def test_a_folder_and_a_huge_file_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasecError, match="cannot be read"):
        read_text(tmp_path)
    monkeypatch.setattr(documents, "LARGEST", 2**20)
    (tmp_path / "x").write_bytes(b" " * 2**20 + b"1")
    with pytest.raises(ErasecError, match="cannot be read") as caught:
        read_text(tmp_path / "x")
    assert caught.value.why == "it is larger than 1 MiB"


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="[]{}=\"'.,:\\#\n-_ax019", max_size=80)))
def test_no_text_gives_an_exception_of_a_library(text: str) -> None:
    for parse in (lambda: parse_json(text, dict[str, Any], HERE), lambda: parse_toml(text, HERE)):
        with suppress(ErasecError):
            assert isinstance(parse(), dict)
