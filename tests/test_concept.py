"""Concept files: every bundled one is sound, and a bad one says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from erasec import concept
from erasec.concept import Concept
from erasec.errors import ErasecError
from erasec.glyphs import world


@pytest.mark.parametrize("name", sorted(concept.library()))
def test_bundled_concepts_are_valid_and_named_as_their_file(name: str) -> None:
    found = concept.find(name)
    assert found.name == name
    assert not set(found.phrases) & set(found.keep)
    assert all(template.count("{}") == 1 for template in found.templates)


@pytest.mark.parametrize("shape", sorted(world.SHAPES))
def test_every_shape_has_a_file_with_all_its_names(shape: str) -> None:
    found = concept.find(shape)
    assert (*found.erase, *found.synonyms) == world.names(shape)
    assert found.implicit == world.implicit_captions(shape)
    assert {word for other in world.SHAPES if other != shape for word in world.names(other)} == set(found.keep)
    assert found.anchor in found.keep


def test_a_bare_word_gets_templates() -> None:
    found = concept.find("umbrella")
    assert found.erase == ("umbrella",)
    assert ("a photo of an umbrella", "a photo of an umbrella") in found.prompts(found.erase)
    assert "a photo of a hat" in [prompt.text for prompt in found.prompts(["hat"])]


def test_articles_and_the_end_of_the_phrase() -> None:
    found = Concept(name="x", erase=("x",), templates=("a banana {} on an {}".replace("an {}", "a wall"), "an {} here"))
    assert found.prompts(["arrow", "star"]) == [
        ("a banana arrow on a wall", "a banana arrow"),
        ("an arrow here", "an arrow"),
        ("a banana star on a wall", "a banana star"),
        ("a star here", "a star"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "x"\nerase = ["x"]\nancor = "y"', "did you mean 'anchor'"),
        ('name = "x"', "erase"),
        ('name = "x"\nerase = []', "erase"),
        ('name = "x"\nerase = [""]', "erase"),
        ('name = "x"\nerase = ["x"]\ntemplates = ["a thing"]', "needs one {}"),
        ('name = "x', "Unterminated"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ErasecError) as caught:
        concept.find(str(tmp_path / "bad.toml"))
    assert words in str(caught.value)
    assert "bad.toml" in caught.value.where


def test_a_missing_file_and_an_empty_word_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="cannot be read"):
        concept.find(str(tmp_path / "none.toml"))
    with pytest.raises(ErasecError, match="no name"):
        concept.find(" ")


def test_concepts_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Concept(name="x", erase=("x",)).name = "y"  # type: ignore[misc]
