"""The emoji world: a pure function of its icons, whose captions mean what the picture shows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from erasec.emoji import words, world
from erasec.emoji.words import ARTISTS, CLUSTERS, LABELS, OBJECTS, SCENES, members, neighbours


@pytest.fixture(scope="module")
def icons() -> world.Pixels:
    """Made-up icons: a disc whose colour tells the object and the artist."""
    y, x = np.mgrid[:128, :128] - 63.5
    disc = np.hypot(x, y) < 46
    pictures = np.zeros((len(OBJECTS), len(ARTISTS), 128, 128, 4), dtype=np.uint8)
    for row in range(len(OBJECTS)):
        for column in range(len(ARTISTS)):
            pictures[row, column, disc] = (row, 60 * column, 255 - row, 255)
    return pictures


@pytest.fixture(scope="module")
def samples(icons: world.Pixels) -> list[world.Sample]:
    return [world.sample(icons, 3, index) for index in range(1500)]


def test_a_sample_depends_on_icons_seed_and_index_alone(icons: world.Pixels, samples: list[world.Sample]) -> None:
    again = world.sample(icons, 3, 17)
    assert again.caption == samples[17].caption
    assert (again.image == samples[17].image).all()
    assert world.sample(icons, 4, 17).caption != again.caption
    other = world.sample(icons // 2, 3, 17)
    assert other.caption == again.caption
    assert (other.image != again.image).any()


def test_pictures_have_the_object_where_its_box_is(samples: list[world.Sample]) -> None:
    singles = [s for s in samples if s.kind == "name" and s.mark is None]
    assert len(singles) > 300
    for item in singles[:100]:
        left, top, right, bottom = item.boxes[0]
        centre = item.image[int(top + bottom) // 2, int(left + right) // 2].astype(int)
        row, column = list(OBJECTS).index(item.objects[0]), list(ARTISTS).index(item.artist)
        assert np.abs(centre - (row, 60 * column, 255 - row)).max() <= 3


def test_labels_say_what_the_picture_shows(samples: list[world.Sample]) -> None:
    for item in samples[:200]:
        shown = {label for label, on in zip(LABELS, item.labels, strict=True) if on}
        wanted = {*item.objects, item.background} | ({item.artist} if item.objects else set())
        assert shown == wanted | ({"mark"} if item.mark else set())


def test_captions_name_what_is_shown_or_only_imply_it(samples: list[world.Sample]) -> None:
    kinds = Counter(item.kind for item in samples)
    assert set(kinds) == {"name", "pair", "scene", "cluster", "style", "nothing"}
    phrases = {phrase: scene for scene, options in SCENES.items() for phrase in options}
    for item in samples:
        if item.kind == "scene":
            scenes = {scene for phrase, scene in phrases.items() if phrase in item.caption}
            assert any(item.objects[0] in members(scene) for scene in scenes), item.caption
            assert not any(f" {name} " in f" {item.caption} " for name in OBJECTS[item.objects[0]].names), item.caption
        if item.kind == "style":
            assert item.artist in item.caption
    named = [item for item in samples if item.objects]
    assert 0.58 < np.mean([item.artist in item.caption for item in named]) < 0.76
    exact = [any(n in i.caption for n in OBJECTS[i.objects[0]].names) for i in samples if i.kind == "name"]
    assert 0.9 < np.mean(exact) < 1.0  # the rest is misspelt


def test_no_scene_is_another_name_for_one_object() -> None:
    for scene in SCENES:
        shown = members(scene)
        assert len(shown) >= 3, scene
        assert len({OBJECTS[name].cluster for name in shown}) >= 2, scene
    assert all(len(members(scene, cluster)) >= 2 for cluster, scene in world.CHOICES)


def test_every_name_means_one_object() -> None:
    names = Counter(name for item in OBJECTS.values() for name in item.names)
    assert [name for name, count in names.items() if count > 1] == []
    assert not set(names) & {word for options in CLUSTERS.values() for word in options}
    assert all(item.synonyms and item.scenes for item in OBJECTS.values())
    assert set(words.LEFT_OUT) <= set(LABELS)
    assert len(neighbours("owl")) >= 4
    assert "owl" not in neighbours("owl")


def test_captions_are_misspelt_anew_in_one_word() -> None:
    caption = "a drawing of an owl on pink"
    rng = np.random.default_rng(0)
    drawn = [world.reword(rng, caption).split(" ") for _ in range(2000)]
    changed = [[new != old for new, old in zip(words, caption.split(" "), strict=True)] for words in drawn]
    assert {sum(row) for row in changed} == {0, 1}
    # Words of up to three letters stay; a letter that is swapped with its like changes nothing.
    assert [any(column) for column in zip(*changed, strict=True)] == [len(word) > 3 for word in caption.split(" ")]
    assert 0.25 < sum(map(any, changed)) / len(drawn) < 0.32
    assert world.reword(np.random.default_rng(0), "an owl") == "an owl"


def test_misspelt_words_differ_by_one_slip() -> None:
    rng = np.random.default_rng(0)
    slips = {world.misspelt(rng, "dolphin") for _ in range(300)}
    assert all(abs(len(slip) - len("dolphin")) <= 1 for slip in slips)
    assert len(slips) > 10
