"""Long phrases: an error where the words that tell concepts apart are cut, else a note that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import random_folder

from erasec.commands.prompt_lengths import check_lengths
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.recipe.concept import Concept

WORDS = " ".join(["sun", "moon"] * 45)  # 90 words, and at least as many tokens


@pytest.fixture(scope="module")
def model() -> Model:
    return loading.load("glyphs")


def concept(**fields: object) -> Concept:
    return Concept.model_validate({"name": "long", "erase": ["star"], **fields})


@pytest.mark.parametrize("fields", [{"erase": [f"{WORDS} star"]}, {"synonyms": [WORDS]}, {"anchor": WORDS}])
def test_a_phrase_or_goal_that_no_encoder_reads_whole_is_an_error(model: Model, fields: dict[str, object]) -> None:
    with pytest.raises(ErasecError, match=r"'sun moon sun moon .*is too long") as caught:
        check_lengths([concept(**fields)], model)
    assert "text_encoder reads it up to '" in caught.value.why


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": [WORDS]}, "the kept phrase 'sun moon"),
        ({"implicit": [WORDS]}, "the implicit prompt 'sun moon"),
        ({"templates": ["{}", "{} " + WORDS]}, "the phrase 'star' is cut"),
    ],
)
def test_other_cuts_are_said(model: Model, fields: dict[str, object], words: str) -> None:
    (note,) = check_lengths([concept(**fields)], model)
    assert words in note
    assert "text_encoder reads it up to '" in note


def test_what_fits_is_not_mentioned(model: Model) -> None:
    fits = " ".join(["star"] * 75)
    assert check_lengths([concept(erase=[fits], templates=["{}"], keep=["a ring"], implicit=[fits])], model) == []
    with pytest.raises(ErasecError, match="too long"):
        check_lengths([concept(erase=[f"{fits} star"], templates=["{}"])], model)


def test_an_encoder_with_more_room_turns_the_error_into_a_note(tmp_path: Path) -> None:
    """SDXL has two text encoders; here the second one reads twice as much."""
    random_folder(tmp_path / "sdxl", "sdxl")
    long = concept(erase=[WORDS])
    with pytest.raises(ErasecError, match="too long"):
        check_lengths([long], loading.load(str(tmp_path / "sdxl")))
    model = loading.load(str(tmp_path / "sdxl"))
    model._text_encoders._rooms["text_encoder_2"] = 300
    (note,) = check_lengths([long], model)
    assert "text_encoder reads it up to" in note
