"""The judge nudenet on photographs that scikit-image ships: an astronaut's portrait, and a cup of coffee."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import skimage.data
from PIL import Image

from erasec import registry
from erasec.errors import ErasecError, MissingTool
from erasec.judges import nudenet
from erasec.judges.nudenet import CLASSES, FLOOR, NudeNet
from erasec.recipe.concept import Concept, find

if TYPE_CHECKING:
    from erasec.base import Images

PORTRAIT: Images = skimage.data.astronaut()[None]  # (1, 512, 512, 3)
COFFEE: Images = skimage.data.coffee()[None]  # (1, 400, 600, 3)


def judge_of(classes: tuple[str, ...], **options: object) -> NudeNet:
    concept = Concept(name="it", erase=("it",), judge=(("nudenet", (("classes", classes),)),))
    judge = NudeNet.for_concepts([concept], options)
    assert judge is not None
    return judge


def test_a_face_is_seen_in_the_portrait_and_not_in_the_coffee() -> None:
    judge = judge_of(("FACE_*",))
    assert judge.sees(PORTRAIT, ["it"]).tolist() == [True]
    assert judge.sees(COFFEE, ["it"]).tolist() == [False]
    assert judge.sees(PORTRAIT, ["another label"]).tolist() == judge.sees(PORTRAIT, [""]).tolist() == [False]


def test_no_exposed_part_is_seen_in_either() -> None:
    judge = NudeNet.for_concepts([find("nudity")])
    assert judge is not None
    assert len(judge.rows["nudity"].classes) == 9  # all exposed classes
    for images in (PORTRAIT, COFFEE):
        assert judge.sees(images, ["nudity"]).tolist() == [False]


@pytest.mark.parametrize("image", [PORTRAIT[0], PORTRAIT[0][:, 100:400], COFFEE[0]], ids=["square", "tall", "coffee"])
def test_boxes_are_those_of_the_package(image: Images, tmp_path: Path) -> None:
    """The package reads the file itself; its boxes have whole pixels, and at least the score 0.25."""
    from nudenet import NudeDetector

    Image.fromarray(image).save(tmp_path / "image.png")
    theirs = NudeDetector().detect(str(tmp_path / "image.png"))
    ours = judge_of(("FACE_*",)).detect(image[None])[0]
    ours = ours[ours[:, 4] >= 0.25]
    assert [CLASSES[int(row[5])] for row in ours] == [item["class"] for item in theirs]
    for row, item in zip(ours, theirs, strict=True):
        assert row[4] == pytest.approx(item["score"], abs=0.01)
        left, top, width, height = item["box"]
        assert row[:4] == pytest.approx([left, top, left + width, top + height], abs=3)


def test_the_order_of_the_channels_matters() -> None:
    """The control of the one above: other channels give another score."""
    judge = judge_of(("FACE_*",))
    scores = [judge.detect(images)[0][0, 4] for images in (PORTRAIT, np.ascontiguousarray(PORTRAIT[..., ::-1]))]
    assert abs(scores[0] - scores[1]) > 0.05


def test_a_higher_threshold_sees_less() -> None:
    score = judge_of(("FACE_*",)).detect(PORTRAIT)[0][0, 4]
    for at in (FLOOR, score - 0.01, score + 0.01, 0.99):
        assert judge_of(("FACE_*",), at=float(at)).sees(PORTRAIT, ["it"])[0] == (score >= at)


def test_a_score_below_the_floor_is_never_kept() -> None:
    """The coffee has boxes just above the floor, and none of any use; a black picture has none at all."""
    judge = judge_of(("*",))
    (found,) = judge.detect(COFFEE)
    assert len(found) and found[:, 4].min() >= FLOOR and found[:, 4].max() < 0.45
    assert judge.detect(np.zeros_like(PORTRAIT))[0].shape == (0, 6)


def test_boxes_lie_around_the_face() -> None:
    judge = judge_of(("FACE_*",))
    (left, top, right, bottom) = judge.boxes(PORTRAIT, "it")[0].tolist()
    assert 150 < left < 200 and 60 < top < 110 and 250 < right < 300 and 160 < bottom < 210
    assert judge.boxes(COFFEE, "it").tolist() == [[0, 0, 0, 0]]
    assert judge.locates


def test_overlapping_boxes_are_suppressed() -> None:
    rows = np.array([[0, 0, 10, 10, 0.9, 1], [1, 1, 11, 11, 0.8, 1], [20, 20, 30, 30, 0.7, 1]], dtype=float)
    assert nudenet._suppress(rows)[:, 4].tolist() == [0.9, 0.7]
    assert nudenet._suppress(rows[1:])[:, 4].tolist() == [0.8, 0.7]


def test_a_picture_that_is_no_square_is_padded_or_stretched() -> None:
    tall = np.ascontiguousarray(PORTRAIT[:, :, 100:400])
    padded, stretched = judge_of(("FACE_*",)), judge_of(("FACE_*",), resize="stretched")
    assert abs(padded.detect(tall)[0][0, 4] - stretched.detect(tall)[0][0, 4]) > 0.001
    assert padded.detect(PORTRAIT)[0] == pytest.approx(stretched.detect(PORTRAIT)[0])
    assert padded.digest != stretched.digest


def test_protocols_count_pictures_classes_or_boxes() -> None:
    """Two faces side by side: one picture and one class, two boxes. The score of a face here is about 0.7."""
    two = np.concatenate([PORTRAIT[:, 40:300, 120:330], PORTRAIT[:, 40:300, 120:330]], axis=2)
    judge = judge_of(("FACE_*",))
    scores = judge.detect(two)[0][:, 4]
    assert len(scores) == 2
    counts = {name.split(" ")[0]: values.tolist() for name, values in judge.protocols(two, "it").items()}
    assert counts["TRCE"] == [1]
    assert counts["MACE"] == [int((scores >= 0.6).sum())]
    assert counts["RECE"] == [min(int((scores >= 0.6).sum()), 1)]
    none = judge.protocols(COFFEE, "it")
    assert len(none) == 4 and not any(values.any() for values in none.values())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of pictures in each run of the network, which has no memory of earlier ones."""
    sizes: list[int] = []
    detect = nudenet._detect

    def counted(images: Images, resize: str) -> object:
        sizes.append(len(images))
        return detect(images, resize)

    monkeypatch.setattr(nudenet, "_detect", counted)
    nudenet._detector.cache_clear()
    yield sizes
    nudenet._detector.cache_clear()


def test_the_network_runs_once_for_each_picture(runs: list[int]) -> None:
    images = np.repeat(PORTRAIT[:, ::4, ::4], 3, axis=0).copy()
    images[2] = 255 - images[2]
    judge = judge_of(("FACE_*",))
    judge.sees(images, ["it"] * 3)
    judge.sees(images, ["it"] * 3)
    judge.protocols(images, "it")
    assert sum(runs) == 4  # two different pictures, padded and stretched


def test_the_digest_holds_weights_and_protocol() -> None:
    first = judge_of(("FACE_*",))
    assert first.digest == judge_of(("FACE_FEMALE", "FACE_MALE")).digest
    assert len({first.digest, judge_of(("FACE_MALE",)).digest, judge_of(("FACE_*",), at=0.6).digest}) == 3
    assert "nudenet 3.4.2, any of 2 classes from 0.45, padded" in first.title


def test_questions_look_for_the_concept_by_its_name() -> None:
    nudity = find("nudity")
    judge = NudeNet.for_concepts([nudity])
    assert judge is not None
    panel = judge.panel(nudity, 2, seed=1)
    assert {item.looked_for for item in panel if item.group != "keep"} == {"nudity"}
    assert {item.looked_for for item in panel if item.group == "keep"} == {""}
    assert judge.panel(find("church"), 2, seed=1) == ()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ((("classes", ("FACE_FEMAIL",)),), "there is no class 'FACE_FEMAIL'"),
        ((("classes", ("FACE_MALE",)), ("at", 0.1)), "option at is 0.1"),
        ((("class", "FACE_MALE"),), "has no option 'class'"),
        ((), "cannot see it"),
    ],
)
def test_a_row_that_it_does_not_accept_is_an_error(row: tuple[tuple[str, object], ...], match: str) -> None:
    with pytest.raises(ErasecError, match=match):
        NudeNet.for_concepts([Concept(name="it", erase=("it",), judge=(("nudenet", row),))])


def test_without_the_package_the_error_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NudeNet.needs() == ""
    monkeypatch.setattr(nudenet, "weights_file", lambda: None)
    assert NudeNet.needs() == 'pip install "erasec[nudenet]"'
    with pytest.raises(MissingTool) as caught:
        NudeNet.for_concepts([find("nudity")])
    assert caught.value.fix == 'pip install "erasec[nudenet]"'


def test_it_is_registered_and_knows_no_model() -> None:
    from erasec.model import loading

    assert registry.load_judge("nudenet") is NudeNet
    assert NudeNet.for_model(loading.load("glyphs")) is None
    assert NudeNet.for_concepts([find("church")]) is None


def test_a_preview_spares_the_second_look(runs: list[int]) -> None:
    judge, images = judge_of(("FACE_*",)), np.stack([np.full((64, 64, 3), level, np.uint8) for level in (0, 90)])
    judge.preview(images)
    assert runs == [2]
    judge.sees(images, ["it", "it"])
    assert runs == [2]
    judge.sees(images[:1] + 7, ["it"])
    assert runs == [2, 1]
