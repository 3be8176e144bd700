"""Triplets: the mosaic, folders of images and what can be wrong with them, and triplets from a model's own images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erasec import registry
from erasec.base import Context
from erasec.errors import ErasecError
from erasec.glyphs.judge import GlyphJudge
from erasec.model import loading
from erasec.model.edit import Dense, Edit
from erasec.recipe import concept as concepts
from erasec.recipe.concept import Concept
from erasec.training import triplets
from erasec.training.denoiser import Denoiser
from erasec.training.images import to_pixels

BOX = np.array([[16, 24, 48, 56]])


def noise(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_the_cells_of_a_mosaic_are_the_means_of_what_they_hide() -> None:
    image = noise()
    result = triplets.mosaic(image, BOX, 4)
    for row in range(4):
        for column in range(4):
            cell = (0, slice(None), slice(24 + 8 * row, 32 + 8 * row), slice(16 + 8 * column, 24 + 8 * column))
            mean = image[cell].mean((1, 2), keepdim=True)
            torch.testing.assert_close(result[cell], mean.expand(3, 8, 8))
    assert len(result[0, 0, 24:56, 16:48].unique()) == 16
    assert len(image[0, 0, 24:56, 16:48].unique()) > 900


def test_around_the_box_the_mosaic_fades_out_and_all_else_stays() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 24:56, 16:48] = 1.0  # one white box: the mosaic of it is white, and so are its extended cells
    across = triplets.mosaic(image, BOX, 2)[0, 0, 40]
    assert across[16:48].min() == 1
    fading = across[8:17]
    assert bool((fading.diff() > 0).all())
    assert 0 < fading[0] < 0.1
    assert across[:8].max() == 0
    far = torch.ones(64, 64, dtype=torch.bool)
    far[16:64, 8:56] = False
    textured = noise()
    assert torch.equal(triplets.mosaic(textured, BOX, 2)[0][:, far], textured[0][:, far])


def test_a_box_at_the_border_has_no_fading_there() -> None:
    result = triplets.mosaic(noise(), np.array([[0, 0, 32, 64]]), 1)
    assert len(result[0, 0, :, :32].unique()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two triplets, by subfolders and by a table: 96 x 64 images, red left, green in the middle, blue right."""
    for part, shade in (("concept", 255), ("censored", 128), ("benign", 64)):
        (tmp_path / part).mkdir()
        for number in range(2):
            image = np.zeros((64, 96, 3), dtype=np.uint8)
            for channel in range(3):
                image[:, 32 * channel : 32 * (channel + 1), channel] = shade - number
            Image.fromarray(image).save(tmp_path / part / f"{number}.png")
    return tmp_path


def table(folder: Path, header: str = "concept,censored,benign", rows: str = "") -> None:
    named = "\n".join(f"concept/{n}.png,censored/{n}.png,benign/{n}.png" for n in range(2))
    (folder / "triplets.csv").write_text(f"{header}\n{rows or named}\n", encoding="utf-8")


def test_a_folder_is_read_by_its_subfolders_or_by_its_table(folder: Path) -> None:
    one = triplets.read_triplets(folder, 32)
    table(folder)
    two = triplets.read_triplets(folder, 32)
    table(folder, "nude_image_path,mos_image_path,norm_image_path")
    three = triplets.read_triplets(folder, 32)
    for part in triplets.PARTS:
        assert torch.equal(getattr(one, part), getattr(two, part))
        assert torch.equal(getattr(one, part), getattr(three, part))
    assert one.concept.shape == (2, 3, 32, 32)
    table(folder, rows="concept/1.png,censored/1.png,benign/0.png")
    assert len(triplets.read_triplets(folder, 32).concept) == 1  # the table is what counts, where there is one


def test_the_centre_square_is_cropped_and_scaled(folder: Path) -> None:
    image = triplets.read_triplets(folder, 32).concept[0]
    # Of 96 columns the middle 64 are left: half the red, all the green, half the blue.
    assert [int(row.argmax()) for row in (image[:, 16, 2], image[:, 16, 16], image[:, 16, 29])] == [0, 1, 2]
    assert image[1, 16, 16] == 1.0
    assert image[0, 16, 16] == -1.0
    larger = triplets.read_triplets(folder, 128).concept
    assert larger.shape == (2, 3, 128, 128)
    assert larger[0, 1, 64, 64] == 1.0


def gone(folder: Path) -> None:
    table(folder, rows="concept/0.png,censored/7.png,benign/0.png")


def alone(folder: Path) -> None:
    (folder / "censored" / "1.png").unlink()


def smaller(folder: Path) -> None:
    Image.new("RGB", (95, 64)).save(folder / "censored" / "1.png")


def no_image(folder: Path) -> None:
    (folder / "benign" / "1.png").write_text("words")


def empty(folder: Path) -> None:
    for file in (folder / "benign").iterdir():
        file.unlink()


def no_column(folder: Path) -> None:
    table(folder, "concept,censord,benign")


def no_cell(folder: Path) -> None:
    table(folder, rows="concept/0.png,,benign/0.png")


def no_row(folder: Path) -> None:
    (folder / "triplets.csv").write_text("concept,censored,benign\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (gone, ("there is no image 7.png", "censored")),
        (alone, ("concept/1.png has no partner censored/1.png",)),
        (smaller, ("censored/1.png is 95 x 64, but concept/1.png is 96 x 64",)),
        (no_image, ("1.png is not an image", "benign")),
        (empty, ("there are no benign images", "triplets.csv")),
        (no_column, ("triplets.csv has no column censored", "censord")),
        (no_cell, ("row 1 of triplets.csv names no censored image",)),
        (no_row, ("triplets.csv has no rows",)),
    ],
)
def test_a_faulty_folder_is_an_error_that_names_the_file(
    folder: Path, harm: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    triplets.read_triplets(folder, 32)  # before the harm all is well
    harm(folder)
    with pytest.raises(ErasecError) as caught:
        triplets.read_triplets(folder, 32)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match="there is no folder"):
        triplets.read_triplets(tmp_path / "nowhere", 32)


def test_a_model_makes_its_own_triplets_and_another_judge_sees_no_star_under_the_mosaic() -> None:
    base, star = loading.load("glyphs"), concepts.find("star", "glyphs")
    own = triplets.generate_triplets(Denoiser(base, Context()), star, 4, 6, 4.0, 2)
    assert len(own.benign) == 4
    assert 2 <= len(own.concept) == len(own.censored) <= 4
    judge = GlyphJudge("b")
    shown, hidden = (judge.sees(to_pixels(part), ["star"] * len(part)) for part in (own.concept, own.censored))
    assert shown.mean() > 0.7
    assert hidden.mean() < 0.3
    assert 0.02 < (own.concept != own.censored).double().mean() < 0.9  # a part of each image, not all of it


def test_triplets_are_sampled_from_the_model_without_edits() -> None:
    base, star = loading.load("glyphs"), concepts.find("star", "glyphs")
    site = next(site for site in base.parameters if site.key == "conv_out.weight")
    ruined = base.with_edit(Edit({site: Dense(torch.ones(site.shape))}, "test", ("star",), base.digest))
    one, two = (triplets.generate_triplets(Denoiser(model, Context()), star, 2, 3, 4.0, 2) for model in (base, ruined))
    assert torch.equal(one.benign, two.benign)
    assert torch.equal(one.censored, two.censored)
    other = triplets.generate_triplets(Denoiser(base, Context(seed=1)), star, 2, 3, 4.0, 2)
    assert not torch.equal(one.benign, other.benign)


def test_without_a_judge_that_sees_the_concept_a_folder_is_needed(random_folder: Path) -> None:
    unknown = loading.load(str(random_folder))
    assert registry.judge_for(unknown, tuning=True) is None
    with pytest.raises(ErasecError, match="no boxes to censor star") as caught:
        triplets.generate_triplets(Denoiser(unknown, Context()), concepts.find("star", "glyphs"), 2, 2, 1.0, 2)
    assert 'triplets="DIR"' in caught.value.fix
    umbrella = Concept(name="umbrella", erase=("umbrella",))
    with pytest.raises(ErasecError, match="no boxes to censor umbrella"):
        triplets.generate_triplets(Denoiser(loading.load("glyphs"), Context()), umbrella, 2, 2, 1.0, 2)


def test_no_image_with_the_concept_is_an_error() -> None:
    hearts = concepts.find("star", "glyphs").model_copy(update={"erase": ("heart",), "synonyms": ()})
    with pytest.raises(ErasecError, match="sees no star in 2 images of star"):
        triplets.generate_triplets(Denoiser(loading.load("glyphs"), Context()), hearts, 2, 6, 4.0, 2)
