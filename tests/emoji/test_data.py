"""Icons come from the very packages that the world was made from, and a render keeps colour and place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from erasec.emoji import data
from erasec.errors import ErasecError

ICONS = {
    "width": 16,
    "height": 16,
    "icons": {
        "owl": {"body": '<rect x="0" y="0" width="8" height="16" fill="#ff0000"/>'},
        "moved": {"left": 8, "body": '<rect x="8" y="0" width="16" height="16" fill="#0000ff" opacity=".5"/>'},
    },
    "aliases": {"hooter": {"parent": "owl"}},
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "noto"
    folder.mkdir()
    content = json.dumps(ICONS).encode()
    (folder / "icons.json").write_bytes(content)
    (folder / "package.json").write_text('{"version": "9.9.9"}')
    monkeypatch.setitem(data.SOURCES, "noto", ("9.9.9", hashlib.sha256(content).hexdigest()))
    return tmp_path


def test_a_set_is_read_when_version_and_digest_are_right(packages: Path) -> None:
    assert data.read_set(packages, "noto")["width"] == 16


@pytest.mark.parametrize("file", ["icons.json", "package.json"])
def test_another_version_or_other_bytes_are_refused(packages: Path, file: str) -> None:
    path = packages / "noto" / file
    path.write_text(path.read_text().replace("9.9.9", "9.9.8").replace("ff0000", "ff0001"))
    with pytest.raises(ErasecError, match="not the icon set"):
        data.read_set(packages, "noto")


def test_a_missing_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ErasecError, match=r"emoji_packages\.sh"):
        data.read_set(tmp_path, "twemoji")


def test_icons_are_rendered_with_premultiplied_alpha_in_the_middle() -> None:
    owl = data.render(data.svg(ICONS, "hooter"))
    assert owl.shape == (128, 128, 4)
    assert owl[64, 40].tolist() == [255, 0, 0, 255]
    assert owl[64, 80].tolist() == [0, 0, 0, 0]
    assert not owl[:16].any()
    moved = data.render(data.svg(ICONS, "moved"))
    assert np.abs(moved[64, 64].astype(int) - [0, 0, 128, 128]).max() <= 1
