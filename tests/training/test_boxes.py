"""Boxes: the cells of a grid that they cover, folders of annotated images, and images that a judge annotates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erasec import registry
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs import world
from erasec.glyphs.judge import GlyphJudge
from erasec.model import loading
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training.boxes import TABLE, covered_cells, generate_annotated_images, read_annotated_images
from erasec.training.denoiser import Denoiser

HEAD = "file,left,top,right,bottom"


@pytest.fixture(scope="module")
def denoiser(random_folder: Path) -> Denoiser:
    return Denoiser(loading.load(str(random_folder)), Context())


def folder(path: Path, lines: Sequence[str], head: str = HEAD, size: tuple[int, int] = (64, 64)) -> Path:
    """A folder of two images, a.png dark with a light square and b.png dark, and a table of ``lines``."""
    pixels = np.full((size[1], size[0], 3), 20, dtype=np.uint8)
    Image.fromarray(pixels).save(path / "b.png")
    pixels[4:12, 40:56] = 240
    Image.fromarray(pixels).save(path / "a.png")
    (path / TABLE).write_text("\n".join([head, *lines]) + "\n")
    return path


def test_a_box_covers_the_cells_that_it_touches() -> None:
    cells = covered_cells([(0.30, 0.0, 0.34, 0.10)], 3, 3)
    assert cells.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert not covered_cells([], 3, 3).any()
    assert covered_cells([(0.0, 0.0, 1.0, 1.0)], 3, 3).all()


@pytest.mark.parametrize("bins", [1, 3, 4, 7])
def test_a_box_that_is_a_cell_covers_that_cell_alone(bins: int) -> None:
    for row in range(bins):
        for column in range(bins):
            box = (column / bins, row / bins, (column + 1) / bins, (row + 1) / bins)
            cells = covered_cells([box], bins, bins)
            assert cells.sum() == 1
            assert cells[row, column]


def test_slack_ignores_cells_that_an_edge_barely_reaches_unless_no_cell_is_left() -> None:
    wide = (0.25, 0.0, 0.65, 0.28)
    assert covered_cells([wide], 3, 3).sum() == 2
    assert covered_cells([wide], 3, 3, 0.3).tolist() == [[False, True, False], [False] * 3, [False] * 3]
    between = (0.3, 0.0, 0.36, 0.1)
    assert torch.equal(covered_cells([between], 3, 3, 0.3), covered_cells([between], 3, 3))
    assert covered_cells([between], 3, 3).sum() == 2


def test_several_boxes_cover_the_cells_of_each() -> None:
    one, two = (0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)
    both = covered_cells([one, two], 4, 4)
    assert torch.equal(both, covered_cells([one], 4, 4) | covered_cells([two], 4, 4))
    assert both.sum() == 2


def test_a_folder_gives_latents_captions_and_boxes(tmp_path: Path, denoiser: Denoiser) -> None:
    head = HEAD + ",confidence,caption"
    lines = ["a.png,40,4,56,12,0.9,a square", "a.png,0,0,8,8,,", "a.png,0,56,8,64,0.2,", "b.png,,,,,,nothing"]
    images = read_annotated_images(folder(tmp_path, lines, head), denoiser)
    assert images.latents.shape == (2, *denoiser.shape)
    assert images.captions == ("a square", "nothing")
    # The confidence of the third box is too low.
    assert images.boxes == (((0.625, 0.0625, 0.875, 0.1875), (0.0, 0.0, 0.125, 0.125)), ())
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(images.latents[:1], denoiser.encode(pixels))
    assert not torch.allclose(images.latents[0], images.latents[1])


def test_captions_that_are_cut_are_said(tmp_path: Path, denoiser: Denoiser, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a.png,40,4,56,12,a square", f"b.png,,,,,{'a star ' * 50}"]
    read_annotated_images(folder(tmp_path, lines, HEAD + ",caption"), denoiser)
    assert "captions of boxes.csv: 1 of 2 are cut. Of 'a star a star" in capsys.readouterr().err
    read_annotated_images(folder(tmp_path, lines[:1], HEAD + ",caption"), denoiser)
    assert capsys.readouterr().err == ""


def test_boxes_are_cropped_with_their_image(tmp_path: Path, denoiser: Denoiser) -> None:
    # 96 x 48: scaled by 4/3 and cut, so that columns 24 to 72 are left.
    lines = ["a.png,36,0,48,24", "a.png,0,0,20,10", "b.png,,,,"]
    images = read_annotated_images(folder(tmp_path, lines, size=(96, 48)), denoiser)
    assert images.latents.shape == (2, *denoiser.shape)
    assert images.boxes == (((0.25, 0.0, 0.5, 0.5),), ())  # the second lies in what is cut off


@pytest.mark.parametrize(
    ("lines", "head", "what"),
    [
        (["a.png,1,2,3,4"], "file,left,top,right", "has no column bottom"),
        ([], HEAD, "has no rows"),
        (["c.png,1,2,3,4"], HEAD, "there is no image c.png"),
        (["boxes.csv,1,2,3,4"], HEAD, "boxes.csv is not an image"),
        (["a.png,1,2,3,4", "a.png,9,2,3,4"], HEAD, "row 2 of boxes.csv has no valid box"),
        (["a.png,1,2,3,"], HEAD, "row 1 of boxes.csv has no valid box"),
        (["a.png,1,2,x,4"], HEAD, "row 1 of boxes.csv has no valid box"),
        (["a.png,1,2,inf,4"], HEAD, "row 1 of boxes.csv has no valid box"),
        ([",1,2,3,4"], HEAD, "row 1 of boxes.csv names no file"),
    ],
)
def test_a_faulty_folder_is_an_error(
    tmp_path: Path, denoiser: Denoiser, lines: list[str], head: str, what: str
) -> None:
    with pytest.raises(ErasecError, match=what):
        read_annotated_images(folder(tmp_path, lines, head), denoiser)


def test_a_folder_without_a_table_is_an_error(tmp_path: Path, denoiser: Denoiser) -> None:
    with pytest.raises(ErasecError, match=r"there is no .*boxes\.csv"):
        read_annotated_images(tmp_path, denoiser)


def test_without_a_judge_a_folder_is_needed(denoiser: Denoiser) -> None:
    with pytest.raises(ErasecError, match="no boxes that say where star is") as caught:
        generate_annotated_images(denoiser, concepts.find("star", "glyphs"), 2, 2, 1.0, 0)
    assert "boxes=" in caught.value.fix


def test_a_concept_that_the_judge_does_not_know_is_an_error() -> None:
    glyphs = Denoiser(loading.load("glyphs"), Context())
    with pytest.raises(ErasecError, match="where a unicorn is"):
        generate_annotated_images(glyphs, Concept(name="a unicorn", erase=("a unicorn",)), 2, 2, 1.0, 0)


def test_sampled_images_have_a_box_where_the_judge_sees_the_concept() -> None:
    glyphs = Denoiser(loading.load("glyphs"), Context())
    images = generate_annotated_images(glyphs, concepts.find("star", "glyphs"), 4, 6, 4.0, 0)
    assert len(images.latents) == len(images.captions) == len(images.boxes) == 4
    named = [any(word in caption for word in world.names("star")) for caption in images.captions]
    assert named == [True, False, True, False]
    assert [bool(boxes) for boxes in images.boxes] == named
    for left, top, right, bottom in (box for boxes in images.boxes for box in boxes):
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


def test_a_mark_is_looked_for_in_images_whose_prompts_do_not_name_it() -> None:
    judge = registry.judge_for(loading.load("glyphs"), tuning=True)
    assert isinstance(judge, GlyphJudge)
    questions = judge.panel(concepts.find("watermark"), 4, 0)
    marks = [question for question in questions if question.looked_for == "mark"]
    assert len(marks) >= 200
    assert {question.group for question in marks} == {"implicit"}
    assert not any("mark" in question.prompt for question in marks)
    shown = {shape for shape in world.SHAPES for question in marks if shape in question.prompt}
    assert shown == {question.looked_for for question in questions if question.group == "keep"} == set(world.SHAPES)
    assert all(question.looked_for != "mark" for question in judge.panel(concepts.find("star", "glyphs"), 4, 0))
