"""Long phrases: an error where the words that tell concepts apart are cut, else a note that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import random_folder
from typer.testing import CliRunner

from erasec.base import Context
from erasec.cli.app import app
from erasec.commands.prompt_lengths import check_lengths, check_options
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.model.view import Model
from erasec.passes.eiup import Eiup
from erasec.passes.uce import Uce
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
    with pytest.raises(ErasecError, match="too long") as caught:
        check_lengths([long], loading.load(str(tmp_path / "sdxl")))
    assert "text_encoder and text_encoder_2 read it up to '" in caught.value.why
    model = loading.load(str(tmp_path / "sdxl"))
    model._text_encoders._rooms["text_encoder_2"] = 300
    (note,) = check_lengths([long], model)
    assert "text_encoder reads it up to" in note


def test_a_prompt_in_an_option_of_a_pass_is_held_to_the_same_room(model: Model) -> None:
    assert check_options([Uce(), Eiup(), Eiup(words=" ".join(["star"] * 75))], model) == []
    with pytest.raises(ErasecError, match="eiup: the option words is too long") as caught:
        check_options([Uce(), Eiup(words=" ".join(["star"] * 75 + ["ring"]))], model)
    assert "text_encoder reads it up to 'star star star star'" in caught.value.why


def test_captions_of_a_prior_that_are_cut_are_said(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text(f"a star\n{WORDS}\na {WORDS}\n")
    run = CliRunner().invoke(app, ["prior", "glyphs", f"{tmp_path}/captions.txt", "--out", f"{tmp_path}/some.prior"])
    assert run.exit_code == 0, run.output
    assert "note: captions of captions.txt: 2 of 3 are cut. Of 'sun moon sun moon" in run.stderr
    assert "text_encoder reads it up to 'moon sun moon sun'" in run.stderr
    assert "3 captions" in run.stdout


def test_the_phrases_that_an_erasure_prompt_has_no_room_for_are_said(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    Eiup().solve(model, concept(erase=[f"star {word}" for word in WORDS.split()]), Context())
    said = capsys.readouterr().err
    assert "eiup: the erasure prompt holds the first " in said and "of 90 phrases of long, up to 'star " in said
    Eiup().solve(model, concept(), Context())
    assert capsys.readouterr().err == ""
