"""The captions that come with erasec, and caption files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from erasec.errors import ErasecError
from erasec.judging import captions
from erasec.recipe import concept
from erasec.recipe.recipe import PROMPT_LIMIT


@pytest.fixture(scope="module")
def shipped() -> tuple[str, ...]:
    return captions.load(captions.DEFAULT, PROMPT_LIMIT, 0).captions


def test_there_are_enough_different_captions(shipped: tuple[str, ...]) -> None:
    assert len(set(shipped)) == len(shipped) == PROMPT_LIMIT == captions.LEAST == 200
    assert len({caption.casefold().split()[-1] for caption in shipped}) > 100


def test_each_is_one_plain_sentence(shipped: tuple[str, ...]) -> None:
    for caption in shipped:
        assert re.fullmatch(r"[A-Z][A-Za-z ,]+\.", caption), caption
        assert 5 <= len(caption.split()) <= 16, caption


def test_none_names_a_bundled_concept_or_asks_for_text(shipped: tuple[str, ...]) -> None:
    phrases = {"sign", "text", "letters", "words", "poster", "logo"}
    for path in concept.library().values():
        phrases |= {phrase for phrase in concept.from_file(path).phrases if concept.PLACEHOLDER not in phrase}
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(phrases))) + r")\b", re.IGNORECASE)
    assert [caption for caption in shipped if pattern.search(caption)] == []


def test_captions_come_from_text_and_from_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\n\n a cat \n")
    assert captions.load(tmp_path / "a.txt", 9, 0).captions == ("a dog", "a cat")
    (tmp_path / "coco.csv").write_text(
        "case_number,source,prompt,evaluation_seed,coco_id\n"
        + "".join(f"{n},coco,caption {n},1,2\n" for n in range(50))
    )
    file = captions.load(tmp_path / "coco.csv", 10, 3)
    assert (file.name, file.total, len(file.captions)) == ("coco.csv", 50, 10)
    assert file == captions.load(tmp_path / "coco.csv", 10, 3) != captions.load(tmp_path / "coco.csv", 10, 4)
    (tmp_path / "b.csv").write_text("x\n1\n")
    with pytest.raises(ErasecError, match="no column of captions"):
        captions.load(tmp_path / "b.csv", 9, 0)
