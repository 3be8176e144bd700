"""Lists of concepts: ``--erase names.txt`` and ``--erase celebrity:names.txt``."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.recipe import recipe
from erasec.recipe.concept import find, listed


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("# the people of the issue\nAda Example\n\n  Bo Example  \n", encoding="utf-8")
    return path


def test_each_line_is_a_name(names: Path) -> None:
    assert listed(str(names)) == ["Ada Example", "Bo Example"]
    assert listed("van gogh") == ["van gogh"]
    assert listed("celebrity:Ada Example") == ["celebrity:Ada Example"]


def test_each_line_is_a_value_of_a_pattern(names: Path) -> None:
    people = [find(name) for name in listed(f"celebrity:{names}")]
    assert [(person.kind, person.erase) for person in people] == [
        ("person", ("Ada Example",)),
        ("person", ("Bo Example",)),
    ]


def test_a_recipe_holds_the_names_and_not_the_list(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(names.parent)
    made = recipe.from_flags("glyphs", ["star", "celebrity:names.txt"])
    assert made.erase == ("star", "celebrity:Ada Example", "celebrity:Bo Example")
    assert recipe.from_toml('model = "glyphs"\nerase = ["names.txt"]').erase == ("Ada Example", "Bo Example")


@pytest.mark.parametrize(
    ("content", "why"), [("", "holds no names"), ("# none\n", "holds no names"), ("a\nb\na\n", "the line 'a' twice")]
)
def test_a_list_without_names_or_with_one_twice_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "n.txt"
    path.write_text(content)
    with pytest.raises(ErasecError, match=why):
        recipe.from_flags("glyphs", [str(path)])


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match=r"gone\.txt"):
        recipe.from_flags("glyphs", [str(tmp_path / "gone.txt")])


def test_the_recipe_of_many_names_can_be_read(tmp_path: Path) -> None:
    """A build writes every concept in full: 1,724 artists in Lu et al. (2024) are the most that were published."""
    people = [find(f"celebrity:Person {number} Example") for number in range(1724)]
    made = recipe.Recipe(model="glyphs", erase=tuple(each.name for each in people), concept=tuple(people))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(made), encoding="utf-8")
    assert (tmp_path / "recipe.toml").stat().st_size > 2**21
    assert recipe.from_file(tmp_path / "recipe.toml") == made
