"""The manifest of a folder: whatever is lost, changed or added below it is found, and the manifest guards itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from erasec.checkpoint import manifest
from erasec.errors import ErasecError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "out"
    for name in ("report.html", "hf/unet/weights", "hf/.gitattributes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty").mkdir()
    manifest.write(root)
    return root


def differences(root: Path) -> dict[str, list[str]]:
    found = manifest.compare(root, manifest.read(root)[0])
    return {state: list(names) for state, names in vars(found).items() if names}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda root: None, {}),
        (lambda root: (root / "report.html").unlink(), {"lost": ["report.html"]}),
        (lambda root: (root / "report.html").write_text("report.htmL"), {"changed": ["report.html"]}),
        (lambda root: (root / "hf/unet/weights").write_text("longer than before"), {"changed": ["hf/unet/weights"]}),
        (lambda root: (root / "hf/.gitattributes").write_text("other"), {"changed": ["hf/.gitattributes"]}),
        (lambda root: (root / "hf/more").touch(), {"added": ["hf/more"]}),
        (lambda root: (root / "more").mkdir(), {"added": ["more/"]}),
        (lambda root: (root / "hf/link").symlink_to(root.parent), {"added": ["hf/link/"]}),
        (lambda root: os.mkfifo(root / "pipe"), {"added": ["pipe"]}),
        (
            lambda root: (root / "report.html").rename(root / "other"),
            {"lost": ["report.html"], "added": ["other"]},
        ),
        # Download tools leave hidden files, and a later build that is rejected has a manifest of its own.
        (lambda root: (root / ".cache").mkdir() or (root / ".cache/x").touch(), {}),
        (lambda root: (root / ".rejected").mkdir() or (root / ".rejected/x").touch(), {}),
    ],
)
def test_what_was_lost_changed_or_added_is_found(
    root: Path, change: Callable[[Path], object], wanted: dict[str, list[str]]
) -> None:
    change(root)
    assert differences(root) == wanted


def test_every_flipped_byte_of_a_manifest_is_found(root: Path) -> None:
    file = root / manifest.FILE
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            found = differences(root)
        except ErasecError:
            continue
        assert found, (place, good[place : place + 20])
    file.write_bytes(good)
    assert not differences(root)


def test_a_movable_file_may_be_taken_away_and_not_changed(root: Path) -> None:
    manifest.write(root, movable=["report.html"])
    (root / "report.html").write_text("report.htmL")
    assert differences(root) == {"changed": ["report.html"]}
    (root / "report.html").unlink()
    assert differences(root) == {}


def test_the_nearest_folder_above_a_path_has_the_manifest(root: Path) -> None:
    for path in (root, root / "hf/unet", root / "hf/unet/weights", root / "hf/none"):
        assert manifest.find(path) == root
    manifest.write(root / "hf")
    assert manifest.find(root / "hf/unet") == root / "hf"
    assert manifest.find(root.parent) is None


def test_renewed_files_are_recorded_and_others_are_not(root: Path) -> None:
    (root / "hf/unet/weights").write_text("new")
    (root / "report.html").write_text("forged")
    manifest.renew([root / "hf/unet/weights", root.parent / "elsewhere"])
    assert manifest.read(root)[0].renewed == ("hf/unet/weights",)
    assert differences(root) == {"changed": ["report.html"]}
    (root / manifest.FILE).write_text("{}")
    with pytest.raises(ErasecError, match="is damaged"):
        manifest.check_readable([root / "report.html"])


def test_known_files_are_not_read_and_linked_files_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a").write_text("a")
    os.link(root / "a", root / "b")
    read: list[str] = []
    whole = manifest.file_digest
    monkeypatch.setattr(manifest, "file_digest", lambda path: read.append(path.name) or whole(path))
    known = manifest.FileRecord(bytes=11, sha256="0" * 64)
    manifest.write(root, {"report.html": known})
    assert sorted(read) == [".gitattributes", "a", "weights"]
    files = manifest.read(root)[0].files
    assert files["report.html"] == known and files["a"] == files["b"]


def test_a_folder_that_is_a_link_is_no_folder_of_a_strict_comparison(root: Path, tmp_path: Path) -> None:
    """Also where the manifest lists it: what lies behind it is in no digest."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("other")
    (root / "hf" / "more").symlink_to(tmp_path / "elsewhere")
    (root / manifest.FILE).unlink()
    manifest.write(root)
    content = manifest.read(root)[0]
    assert "hf/more/" in content.folders
    assert manifest.compare(root, content).all == ()
    assert manifest.compare(root, content, strict=True).added == ("hf/more/",)


def test_a_manifest_that_fills_the_memory_is_refused(root: Path) -> None:
    with (root / manifest.FILE).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ErasecError, match="cannot be read") as caught:
        manifest.read(root)
    assert "larger than" in caught.value.why and caught.value.fix
