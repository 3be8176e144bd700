"""The one exception that users see: what went wrong, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BAD_INPUT = 2
CHECK_FAILED = 3
TOOL_MISSING = 4


class ErasecError(Exception):
    """A failure that a person can act on; printed without a traceback."""

    exit_code = BAD_INPUT

    def __init__(self, what: str, why: str = "", fix: str = "", where: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.where = what, why, fix, where

    def __str__(self) -> str:
        parts = (("error", self.what), ("in", self.where), ("why", self.why), ("fix", self.fix))
        return "\n".join(f"{label:>5}: {text}" for label, text in parts if text)


class CheckFailed(ErasecError):
    """A built artifact did not pass its checks."""

    exit_code = CHECK_FAILED


class MissingTool(ErasecError):
    """An optional package or program that the request needs is not there."""

    exit_code = TOOL_MISSING


def nearest(name: str, options: Iterable[str]) -> str:
    """A half sentence that suggests the nearest of ``options``, or lists them."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(options)}"
