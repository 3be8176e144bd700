"""The concept files of the emoji world are those that its words make."""

from __future__ import annotations

import tomllib

import pytest

from erasec.emoji import concepts
from erasec.emoji.judge import EmojiJudge, label_of
from erasec.emoji.words import ARTISTS, LABELS, OBJECTS, neighbours
from erasec.recipe import concept

FOLDER = concept.LIBRARY / "worlds" / "emoji"


def test_the_files_are_what_the_words_make() -> None:
    made = concepts.concepts()
    assert len(made) == len(OBJECTS) + len(ARTISTS)
    assert {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.toml")} == made


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_the_judge_knows_what_each_file_erases(name: str) -> None:
    item = concept.from_file(FOLDER / f"{name}.toml")
    assert label_of(item) in LABELS
    assert label_of(item) == (item.label or item.name)


def test_every_second_neighbour_is_kept() -> None:
    for name in OBJECTS:
        item, close = concept.find(name, "emoji"), neighbours(name)
        assert set(close[::2]) <= set(item.keep) and not set(close[1::2]) & set(item.keep)


@pytest.mark.parametrize("phrase", ["owl", "the style of Noto"])
def test_a_phrase_finds_its_file(phrase: str) -> None:
    assert concept.find(phrase, "emoji").kind == ("object" if phrase == "owl" else "style")
    assert concept.find(phrase).kind == ""  # models of no world have no such file


def test_the_panel_asks_by_name_synonym_and_implication_and_for_neighbours() -> None:
    item = concept.find("owl", "emoji")
    panel = EmojiJudge().panel(item, 8, seed=2)
    groups = [question.group for question in panel]
    assert groups.count("name") == groups.count("synonym") == groups.count("implicit") == 8
    for question in panel:
        spoken = set(question.prompt.split())
        assert ("owl" in spoken) == (question.group == "name"), question
        assert bool(spoken & {"hooter", "owlet"}) == (question.group == "synonym"), question
    assert set(neighbours("owl")) <= {q.looked_for for q in panel if q.group == "keep"}
    assert len({q.seed for q in panel}) == len(panel)


def test_the_panel_of_a_style_asks_for_other_artists() -> None:
    panel = EmojiJudge().panel(concept.find("the style of Noto", "emoji"), 8, seed=2)
    assert {q.looked_for for q in panel if q.group == "name"} == {"Noto"}
    kept = {q.looked_for for q in panel if q.group == "keep"}
    assert set(ARTISTS) - {"Noto"} <= kept and "Noto" not in kept
