"""Names of output folders and files are safe and short."""

from __future__ import annotations

import pytest

from erasec.checkpoint.staging import NAME_BYTES, file_name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["star", "golf ball"], "star-golf-ball"),
        (["AC/DC logo"], "AC-DC-logo"),
        (["../x"], "x"),
        (["/x", "..", "///"], "x"),
        ([".hidden", "v1.4"], "hidden-v1.4"),
        (["///"], ""),
    ],
)
def test_file_names_stay_in_their_folder(words: list[str], name: str) -> None:
    assert file_name(words) == name


def test_file_names_are_cut_by_bytes() -> None:
    assert file_name(["\u732b" * 80]) == "\u732b" * (NAME_BYTES // 3)
    assert file_name(["a" * 119, "b"]) == "a" * 119
