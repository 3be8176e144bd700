"""Options of passes and targets: typed by their defaults, and a wrong one is told in words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from erasec.base import with_options
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rigde": 0.1}, "did you mean 'ridge'"),
        ({"ridge": "much"}, "it takes a float"),
        ({"steps": 2.5}, "it takes a int"),
        ({"steps": True}, "it takes a int"),
        ({"exact": 1}, "it takes a bool"),
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
