"""``erasec run``: the names of its pictures, and how they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasec.commands.run import cut_notes, picture_paths, save_pictures
from erasec.errors import ErasecError
from erasec.model.loading import bundled_folder
from erasec.model.sidecar import Extras, write_extras
from erasec.runtime.bundle import open_bundle


def test_several_pictures_are_numbered() -> None:
    assert picture_paths(Path("a/x.png"), 1) == [Path("a/x.png")]
    assert picture_paths(Path("a/x.png"), 3) == [Path("a/x-0.png"), Path("a/x-1.png"), Path("a/x-2.png")]


def test_a_prompt_beyond_the_text_encoder_is_said() -> None:
    opened = open_bundle(bundled_folder("glyphs"), "torch")
    assert cut_notes(opened, "a star", None) == []
    assert cut_notes(opened, "a star " * 37 + "a", "") == []
    (prompt,) = cut_notes(opened, "a star " * 37 + "a red ring", None)
    assert prompt == "the prompt is cut: the text encoder reads it up to 'star a star a'."
    (negative,) = cut_notes(opened, "", "a star " * 50)
    assert negative.startswith("the negative prompt is cut")


def test_the_bundles_own_negative_prompt_is_held_to_the_same_room(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundled_folder("glyphs"), tmp_path / "bundle"))
    write_extras(folder, Extras(negative="a star " * 50))
    opened = open_bundle(folder, "torch")
    (negative,) = cut_notes(opened, "a star", None)
    assert negative.startswith("the negative prompt is cut")
    assert cut_notes(opened, "a star", "") == []


@pytest.mark.parametrize("name", ["x.pgn", "x", "x.toml"])
def test_a_suffix_that_pillow_does_not_write_is_refused(name: str) -> None:
    with pytest.raises(ErasecError, match=f"a picture cannot be written to {name}") as caught:
        picture_paths(Path(name), 1)
    assert Path(name).suffix in caught.value.why and ".png" in caught.value.fix


def test_pictures_are_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    paths = picture_paths(tmp_path / "x.png", 2)
    save_pictures(images, paths)
    assert all(np.array_equal(np.array(Image.open(path)), image) for path, image in zip(paths, images, strict=True))

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_pictures(images[:1], [tmp_path / "y.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.png", "x-1.png"]
