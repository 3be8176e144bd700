from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs import world
from erasec.glyphs.judging import GlyphJudge
from erasec.judging import judge
from erasec.model import view as model
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import boxes as marked
from erasec.training.denoiser import Denoiser

HEAD = "file,left,top,right,bottom"


@pytest.fixture(scope="module")
def denoiser(random_folder: Path) -> Denoiser:
    return Denoiser(model.load(str(random_folder)), Context())


def folder(path: Path, lines: Sequence[str], head: str = HEAD, size: tuple[int, int] = (64, 64)) -> Path:
    """Two pictures, a.png dark with a light square in it, b.png dark, and a table of ``lines``."""
    pixels = np.full((size[1], size[0], 3), 20, dtype=np.uint8)
    Image.fromarray(pixels).save(path / "b.png")
    pixels[4:12, 40:56] = 240
    Image.fromarray(pixels).save(path / "a.png")
    (path / marked.TABLE).write_text("\n".join([head, *lines]) + "\n")
    return path


def test_a_box_covers_the_cells_that_it_touches() -> None:
    cells = marked.covered([(0.30, 0.0, 0.34, 0.10)], 3, 3)
    assert cells.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert not marked.covered([], 3, 3).any()
    assert marked.covered([(0.0, 0.0, 1.0, 1.0)], 3, 3).all()


@pytest.mark.parametrize("bins", [1, 3, 4, 7])
def test_a_box_that_is_a_cell_covers_that_cell_alone(bins: int) -> None:
    for row in range(bins):
        for column in range(bins):
            box = (column / bins, row / bins, (column + 1) / bins, (row + 1) / bins)
            cells = marked.covered([box], bins, bins)
            assert cells.sum() == 1
            assert cells[row, column]


def test_slack_leaves_out_what_an_edge_barely_reaches_but_never_all() -> None:
    wide = (0.25, 0.0, 0.65, 0.28)
    assert marked.covered([wide], 3, 3).sum() == 2
    assert marked.covered([wide], 3, 3, 0.3).tolist() == [[False, True, False], [False] * 3, [False] * 3]
    between = (0.3, 0.0, 0.36, 0.1)
    assert torch.equal(marked.covered([between], 3, 3, 0.3), marked.covered([between], 3, 3))
    assert marked.covered([between], 3, 3).sum() == 2


def test_several_boxes_cover_what_any_of_them_does() -> None:
    one, two = (0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)
    both = marked.covered([one, two], 4, 4)
    assert torch.equal(both, marked.covered([one], 4, 4) | marked.covered([two], 4, 4))
    assert both.sum() == 2


def test_a_folder_gives_latents_captions_and_boxes(tmp_path: Path, denoiser: Denoiser) -> None:
    head = HEAD + ",confidence,caption"
    lines = ["a.png,40,4,56,12,0.9,a square", "a.png,0,0,8,8,,", "a.png,0,56,8,64,0.2,", "b.png,,,,,,nothing"]
    found = marked.read(folder(tmp_path, lines, head), denoiser)
    assert found.latents.shape == (2, *denoiser.shape)
    assert found.captions == ("a square", "nothing")
    # The third box is one that the detector was not sure of.
    assert found.boxes == (((0.625, 0.0625, 0.875, 0.1875), (0.0, 0.0, 0.125, 0.125)), ())
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(found.latents[:1], denoiser.encode(pixels))
    assert not torch.allclose(found.latents[0], found.latents[1])


def test_boxes_follow_the_picture_to_the_model_s_size(tmp_path: Path, denoiser: Denoiser) -> None:
    # 96 x 48: scaled by 4/3 and cut, so that columns 24 to 72 are left.
    lines = ["a.png,36,0,48,24", "a.png,0,0,20,10", "b.png,,,,"]
    found = marked.read(folder(tmp_path, lines, size=(96, 48)), denoiser)
    assert found.latents.shape == (2, *denoiser.shape)
    assert found.boxes == (((0.25, 0.0, 0.5, 0.5),), ())  # the second lies in what is cut off


@pytest.mark.parametrize(
    ("lines", "head", "what"),
    [
        (["a.png,1,2,3,4"], "file,left,top,right", "has no column bottom"),
        ([], HEAD, "has no rows"),
        (["c.png,1,2,3,4"], HEAD, "there is no picture c.png"),
        (["boxes.csv,1,2,3,4"], HEAD, "boxes.csv is not an image"),
        (["a.png,1,2,3,4", "a.png,9,2,3,4"], HEAD, "row 2 of boxes.csv has no box"),
        (["a.png,1,2,3,"], HEAD, "row 1 of boxes.csv has no box"),
        (["a.png,1,2,x,4"], HEAD, "row 1 of boxes.csv has no box"),
        (["a.png,1,2,inf,4"], HEAD, "row 1 of boxes.csv has no box"),
        ([",1,2,3,4"], HEAD, "row 1 of boxes.csv names no file"),
    ],
)
def test_a_faulty_folder_is_told(tmp_path: Path, denoiser: Denoiser, lines: list[str], head: str, what: str) -> None:
    with pytest.raises(ErasecError, match=what):
        marked.read(folder(tmp_path, lines, head), denoiser)


def test_a_folder_without_a_table_is_told(tmp_path: Path, denoiser: Denoiser) -> None:
    with pytest.raises(ErasecError, match=r"there is no .*boxes\.csv"):
        marked.read(tmp_path, denoiser)


def test_without_a_judge_a_folder_is_asked_for(denoiser: Denoiser) -> None:
    with pytest.raises(ErasecError, match="no boxes that say where star is") as caught:
        marked.made(denoiser, concepts.find("star"), 2, 2, 1.0, 0)
    assert "boxes=" in caught.value.fix


def test_what_no_judge_knows_is_told() -> None:
    glyphs = Denoiser(model.load("glyphs"), Context())
    with pytest.raises(ErasecError, match="where a unicorn is"):
        marked.made(glyphs, Concept(name="a unicorn", erase=("a unicorn",)), 2, 2, 1.0, 0)


def test_own_pictures_have_a_box_where_the_judge_sees_the_concept() -> None:
    glyphs = Denoiser(model.load("glyphs"), Context())
    found = marked.made(glyphs, concepts.find("star"), 4, 6, 4.0, 0)
    assert len(found.latents) == len(found.captions) == len(found.boxes) == 4
    named = [any(word in caption for word in world.names("star")) for caption in found.captions]
    assert named == [True, False, True, False]
    assert [bool(boxes) for boxes in found.boxes] == named
    for left, top, right, bottom in (box for boxes in found.boxes for box in boxes):
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


def test_a_mark_is_looked_for_where_nothing_asks_for_it() -> None:
    asker = judge.adviser(model.load("glyphs"))
    assert isinstance(asker, GlyphJudge)
    questions = asker.panel(concepts.find("watermark"), 4, 0)
    asked = [question for question in questions if question.looked_for == "mark"]
    assert len(asked) >= 200
    assert {question.group for question in asked} == {"implicit"}
    assert not any("mark" in question.prompt for question in asked)
    shown = {shape for shape in world.SHAPES for question in asked if shape in question.prompt}
    assert shown == {question.looked_for for question in questions if question.group == "keep"} == set(world.SHAPES)
    assert all(question.looked_for != "mark" for question in asker.panel(concepts.find("star"), 4, 0))
