"""Presets: tables of options by pass and kind, read from a file that a stranger may have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.recipe.presets import FILE, KINDS, Presets, parse_presets, read_presets

TEXT = """
[default]
style = "esd"
"" = "rece"

[esd]
lr = 2e-4
train = "u"

[esd.style]
steps = 3

[esd.""]
steps = 4

["trce.steer".safety]
reference = true
"""


def read(folder: Path, text: str) -> Presets:
    (folder / FILE).write_text(text)
    return read_presets(folder)


def test_tables_are_by_pass_and_kind(tmp_path: Path) -> None:
    presets = read(tmp_path, TEXT)
    assert presets.default == {"style": "esd", "": "rece"}
    assert presets.of("esd", None) == [{"lr": 2e-4, "train": "u"}]
    assert presets.of("esd", "style") == [{"lr": 2e-4, "train": "u"}, {"steps": 3}]
    assert presets.of("esd", "") == [{"lr": 2e-4, "train": "u"}, {"steps": 4}]
    assert presets.of("esd", "object") == presets.of("esd", None)
    assert presets.of("trce.steer", "safety") == [{"reference": True}]
    assert presets.of("trce.steer", None) == presets.of("uce", "style") == []
    assert presets.where == str(tmp_path / FILE)


def test_a_folder_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_presets(tmp_path) == Presets()


def test_the_kinds_are_those_of_concepts() -> None:
    assert set(KINDS) == {"", "safety", "style", "object", "person", "mark"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("esd = 3", ("'esd'", "no table")),
        ("[esd]\nlr = [1]", ("'esd.lr'", "an option is text")),
        ("[esd]\nlr = nan", ("'esd.lr'", "a finite number")),
        ("[esd]\nlr = 1979-05-27", ("'esd.lr'", "an option is text")),
        ("[esd.style]\nlr = [1]", ("'esd.style.lr'", "an option is text")),
        ("[esd.stile]\nlr = 1.0", ("'esd.stile'", "did you mean 'style'")),
        ("[trce.steer]\nlr = 1.0", ("'trce.steer'", '["trce.steer"]')),
        ("[esd.style.lr]\nx = 1", ("'esd.style.lr'", "an option is text")),
        ("[default]\nstile = 'esd'", ("'default.stile'", "did you mean 'style'")),
        ("[default]\nstyle = 3", ("'style'", "no name of a pass")),
        ("[default]\nstyle = 'evil.py:Evil'", ("'style'", "Python code (evil.py:Evil)")),
        ("['evil.py:Evil']\nx = 1", ("'evil.py:Evil'", "Python code (evil.py:Evil)")),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ErasecError) as caught:
        read(tmp_path, text)
    assert caught.value.where == str(tmp_path / FILE)
    assert words[0] in caught.value.what and words[1] in caught.value.why


@pytest.mark.parametrize("content", [b"[esd", b"\xff\xfe", b"x = 1\n" * 400_000, b"a." * 60 + b"a = 1"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ErasecError) as caught:
        read_presets(tmp_path)
    assert caught.value.where == str(tmp_path / FILE)


def test_parsing_leaves_passes_and_options_to_those_who_load_passes() -> None:
    assert parse_presets({"theirs": {"x": 1}}, "").of("theirs", None) == [{"x": 1}]
