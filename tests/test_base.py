"""Options of passes and targets: typed by their defaults, and a wrong one is told in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from erasec.base import NAME_BYTES, file_name, finite, with_options
from erasec.checkpoint.safetensors import read_header, save
from erasec.errors import ErasecError


@dataclass(frozen=True)
class Options:
    ridge: float = 0.1
    rows: str = "tail"
    steps: int = 3
    exact: bool = False


def test_options_become_fields_and_whole_numbers_floats() -> None:
    assert with_options(Options, {}, "uce") == Options()
    made = with_options(Options, {"ridge": 2, "exact": True, "rows": "last"}, "uce")
    assert made == Options(ridge=2.0, exact=True, rows="last")
    assert isinstance(made.ridge, float)
    assert with_options(Options, {"rows": 89}, "uce") == Options(rows="89")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rigde": 0.1}, "did you mean 'ridge'"),
        ({"ridge": "much"}, "it takes a float"),
        ({"steps": 2.5}, "it takes a int"),
        ({"steps": True}, "it takes a int"),
        ({"exact": 1}, "it takes a bool"),
        ({"rows": True}, "it takes a str"),
        ({"ridge": True}, "it takes a float"),
    ],
)
def test_wrong_options_are_told(options: dict[str, object], words: str) -> None:
    with pytest.raises(ErasecError) as caught:
        with_options(Options, options, "uce")
    assert words in str(caught.value)


def test_a_field_without_default_is_the_authors_error() -> None:
    @dataclass(frozen=True)
    class Bare:
        ridge: float

    with pytest.raises(ErasecError, match="has no default"):
        with_options(Bare, {}, "mine")


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_counted(tmp_path: Path, value: float) -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([0.0, value], dtype=torch.bfloat16), "c": torch.ones(2).long()}
    save(tmp_path / "some.safetensors", tensors)
    check = finite("some/finite", read_header(tmp_path / "some.safetensors")[0])
    bad = value != 1.0
    assert (check.name, check.value, check.limit, check.passed) == ("some/finite", float(bad), 0.0, not bad)
    assert "all 2 floating tensors" in check.how
    assert check.how.endswith("the first is b") == bad


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
