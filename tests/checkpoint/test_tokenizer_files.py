"""The files of a tokenizer: all there, of the right content, and with a row for each token that is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasec.checkpoint.tokenizer_files import check_rows, read_tokenizer
from erasec.errors import ErasecError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
BYTE_PAIRS = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.json").write_text(json.dumps(BYTE_PAIRS["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "bos_token": "a"}))
    return tmp_path


def test_both_forms_are_read(folder: Path) -> None:
    files = read_tokenizer(folder)
    assert (files.vocabulary, files.merges) == ({"a": 0, "b": 1, "ab": 2}, (("a", "b"),))
    (folder / "tokenizer.json").write_text(json.dumps({"model": BYTE_PAIRS | {"merges": [["b", "a"]]}}))
    assert read_tokenizer(folder).merges == (("b", "a"),)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}))
    assert read_tokenizer(folder).vocabulary == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("merges.txt", None, "merges.txt cannot be read"),
        ("merges.txt", "a b c\n", "'a b c' is no pair of tokens"),
        ("merges.txt", POINTER, "merges.txt is a Git LFS pointer"),
        ("vocab.json", POINTER, "vocab.json is a Git LFS pointer"),
        ("vocab.json", '{"a": 0, "b": 0}', "two of its tokens have one id"),
        ("vocab.json", '{"a": "0"}', "a: it should be a valid integer"),
        ("vocab.json", '{"a": -1}', "a: it should be greater"),
        ("tokenizer_config.json", '{"model_max_length": 0}', "model_max_length"),
        ("tokenizer_config.json", '{"bos_token": {}}', "bos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder"),
        ("special_tokens_map.json", '{"eos_token": [1]}', "eos_token"),
        ("added_tokens.json", "[]", "it should be an object"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "it has no 'merges'"),
        ("spiece.model", POINTER, "spiece.model is a Git LFS pointer"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, text: str | None, words: str) -> None:
    (folder / name).unlink(missing_ok=True) if text is None else (folder / name).write_text(text)
    with pytest.raises(ErasecError) as caught:
        read_tokenizer(folder)
    assert words in str(caught.value) and name in str(caught.value)


def test_a_token_without_a_row_is_named(tmp_path: Path) -> None:
    def names(number: int) -> Any:
        return f"<{number}>"

    check_rows([0, 5, 9], 10, names, tmp_path)
    check_rows([], 0, names, tmp_path)
    with pytest.raises(ErasecError, match="the token '<10>' has no row") as caught:
        check_rows([0, 10, 9], 10, names, tmp_path)
    assert "10 rows" in caught.value.why
