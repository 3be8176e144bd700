"""The prompts of an attacker: misspelt, negated and buried names are what they claim to be."""

from __future__ import annotations

import pytest

from erasec.audit.prompts import LONG, NEGATIONS, buried, languages, misspell_name, misspelt, translated
from erasec.recipe.concept import from_file, library, worlds


def test_a_typing_error_changes_the_longest_word_and_only_it() -> None:
    for number in range(9):
        wrong = misspelt("a polar bear", number)
        assert wrong != "a polar bear"
        assert wrong.split()[0] == "a"
        assert wrong.split()[2] == "bear"
        assert wrong.split()[1][0] == "p"  # the first letter stays: people notice it


def test_errors_are_swaps_omissions_and_doublings() -> None:
    assert [misspelt("owl", number) for number in range(3)] == ["olw", "ol", "owwl"]


def test_a_word_of_two_letters_stays() -> None:
    assert misspelt("ox", 1) == "ox"


def test_the_name_in_a_prompt_is_misspelt_and_nothing_else() -> None:
    phrases = ("truck", "garbage truck")
    assert misspell_name("a Garbage Truck, in starlight", phrases, 0) == "a Grabage Truck, in starlight"
    assert misspell_name("a starfish", ("star",), 1) == "sar"  # a prompt without the name must not stay as it is


def test_the_name_is_in_the_middle_of_a_long_prompt() -> None:
    around = ["a red circle on white", "two blue squares"]
    text = buried("a star", around, 3)
    assert text.count("a star") == 1
    words = text.split()
    assert LONG - 8 <= len(words) <= LONG + 8
    assert 0.3 < words.index("star,") / len(words) < 0.7


@pytest.mark.parametrize("negation", NEGATIONS)
def test_every_negation_has_a_place_for_the_phrase(negation: str) -> None:
    assert negation.format("star").endswith("star")


def test_languages_take_turns_and_only_the_name_changes() -> None:
    texts = translated(["a Red Star on white", "a star", "a night sky"], ("star",))
    words = list(languages()["star"].values())
    assert texts == [f"a Red {words[0]} on white", f"a {words[1]}", words[2]]


def test_the_longest_name_is_translated_and_an_unknown_one_replaced() -> None:
    (text,) = translated(["an English springer spaniel on grass"], ("English springer", "English springer spaniel"))
    assert text == f"an {languages()['english springer spaniel']['de']} on grass"
    assert translated(["a springer"], ("English springer",)) == [languages()["english springer"]["de"]]


def test_a_concept_without_translations_has_no_such_variant() -> None:
    assert translated(["a griffin"], ("griffin",)) == []


def test_every_table_is_a_phrase_of_a_bundled_concept_in_other_words() -> None:
    files = {path: path for world in ("", *worlds()) for path in library(world).values()}
    phrases = {phrase.lower() for path in files for phrase in from_file(path).erase}
    for phrase, words in languages().items():
        assert phrase in phrases and words
        assert set(words) <= {"de", "fr", "es", "it", "pt", "ja", "zh", "ru"}
        assert phrase not in {word.lower() for word in words.values()}


@pytest.mark.parametrize("phrase", ["hot air balloon", "tennis", "coffee", "owl"])
def test_a_misspelt_name_is_never_spelt_well(phrase: str) -> None:
    """Two equal letters cannot be swapped."""
    assert all(misspelt(phrase, number) != phrase for number in range(60))
