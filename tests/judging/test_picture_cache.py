"""The cache of pictures: it returns the picture that was stored, or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erasec.attention.sampling import Sampling
from erasec.base import Question
from erasec.checkpoint import store
from erasec.judging import picture_cache
from erasec.model import loading

QUESTION, SAMPLING = Question("name", "a church", 7, ""), Sampling(4, 4.0)
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "cache"))
    store._note.cache_clear()
    return tmp_path / "cache"


def test_a_picture_comes_back_as_it_was(own: Path) -> None:
    assert picture_cache.load("a") is None
    picture_cache.store("a", PICTURE)
    assert np.array_equal(picture_cache.load("a"), PICTURE)  # type: ignore[arg-type]
    assert picture_cache.load("b") is None
    assert os.listdir(own / "pictures") == ["a"]


@pytest.mark.parametrize("where", [0, 31, 32, 40, -1])
def test_a_picture_with_a_flipped_bit_is_not_returned(own: Path, where: int) -> None:
    picture_cache.store("a", PICTURE)
    file = own / "pictures" / "a"
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    assert picture_cache.load("a") is None
    file.write_bytes(content[: len(content) // 2])
    assert picture_cache.load("a") is None
    picture_cache.store("a", PICTURE)
    assert picture_cache.load("a") is not None


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a mosque"},
        {"seed": 8},
        {"steps": 5},
        {"guidance": 4.5},
        {"dtype": "float16"},
        {"device": "cuda:0"},
        {"side": 256},
        {"identity": "other"},
    ],
)
def test_whatever_decides_a_picture_is_in_its_name(change: dict[str, object]) -> None:
    question = replace(QUESTION, **{k: v for k, v in change.items() if k in ("prompt", "seed")})  # type: ignore[arg-type]
    sampling = replace(SAMPLING, **{k: v for k, v in change.items() if hasattr(SAMPLING, k)})  # type: ignore[arg-type]
    identity = str(change.get("identity", "model"))
    plain = picture_cache.key("model", QUESTION, SAMPLING)
    assert picture_cache.key(identity, question, sampling) != plain
    assert picture_cache.key("model", replace(QUESTION, group="keep"), SAMPLING) == plain
    one, other = (picture_cache.key("model", QUESTION, replace(SAMPLING, device=f"cuda:{n}")) for n in (0, 1))
    assert one == other


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", lambda text: text.replace('"steps_offset": 1', '"steps_offset": 0')),
        ("tokenizer/merges.txt", lambda text: text + "\n"),
        ("unet/config.json", lambda text: text + " "),
    ],
)
def test_the_identity_of_a_model_covers_its_settings(
    random_folder: Path, tmp_path: Path, file: str, change: Callable[[str], str]
) -> None:
    folder = Path(shutil.copytree(random_folder, tmp_path / "model"))
    copied = picture_cache.identity(loading.load(str(folder)))
    assert copied == picture_cache.identity(loading.load(str(random_folder)))
    before = (folder / file).read_text()
    (folder / file).write_text(change(before))
    assert (folder / file).read_text() != before
    assert picture_cache.identity(loading.load(str(folder))) != copied


@pytest.mark.parametrize("name", ["code_digest", "versions"])
def test_the_identity_of_a_model_covers_what_paints(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = loading.load(str(random_folder))
    before = picture_cache.identity(model)
    monkeypatch.setattr(picture_cache, name, lambda *_: "another")
    assert picture_cache.identity(model) != before


def test_a_cache_that_cannot_be_used_is_a_note(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.parent.mkdir(exist_ok=True)
    own.touch()  # a file is in its place
    picture_cache.store("a", PICTURE)
    assert picture_cache.load("a") is None
    assert "the cache cannot be used" in capsys.readouterr().err


def test_commands_remove_what_killed_ones_left_in_the_folder_of_pictures(own: Path) -> None:
    assert own / picture_cache.FOLDER in store.caches()
