"""Passes with the options that suit glyphs, for tests that create passes without a plan."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from erasec.base import Pass
from erasec.model.loading import bundled_folder
from erasec.recipe.presets import Presets, read_presets

P = TypeVar("P", bound=Pass)


@cache
def presets() -> Presets:
    return read_presets(bundled_folder("glyphs"))


def tuned(kind: type[P], **options: Any) -> P:
    """A pass as a build of glyphs has it, with ``options`` in place of the presets. Glyphs has none by kind."""
    values: dict[str, Any] = {}
    for table in presets().of(kind.name, None):
        values |= table
    return kind(**{**values, **options})
