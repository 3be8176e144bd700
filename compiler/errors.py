"""The exceptions that users see: what failed, why, and what to do about it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence

# Exit codes of the command line.
BAD_INPUT = 2
CHECK_FAILED = 3
TOOL_MISSING = 4
INTERRUPTED = 130  # 128 + SIGINT, as shells count

# The longest part of a message, and the longest value that a message quotes, in characters.
LONGEST = 600
LONGEST_VALUE = 80


def printable(text: str, keep: str = "") -> str:
    """``text`` with control and formatting characters written as escapes, such as \\x1b, except those in ``keep``.

    Names and metadata of files can hold any character, and a terminal executes some of them.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text)


def shown(value: object, longest: int = LONGEST_VALUE) -> str:
    """A value from a file or a command line as messages quote it: as Python writes it, and shortened."""
    return _shortened(repr(value), longest)


def words(items: Iterable[str], most: int = 8) -> str:
    """A list such as "a, b and c". After the first ``most`` items, "and 3 more"."""
    items = list(items)
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def _shortened(text: str, longest: int) -> str:
    """``text`` without its middle if it is longer than ``longest``."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


class ErasecError(Exception):
    """A failure that a user can act on. The command line prints it without a traceback.

    ``what`` states the failure, ``why`` its cause, ``fix`` what to do, and ``where`` the file or class at fault. As
    text, each is one line of printable characters, at most about LONGEST of them.
    """

    exit_code = BAD_INPUT

    def __init__(self, what: str, why: str = "", fix: str = "", where: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.where = what, why, fix, where

    def __str__(self) -> str:
        parts = (("error", self.what), ("in", self.where), ("why", self.why), ("fix", self.fix))
        return "\n".join(f"{label:>5}: {_shortened(printable(text), LONGEST)}" for label, text in parts if text)


class CheckFailed(ErasecError):
    """A built artifact did not pass its checks."""

    exit_code = CHECK_FAILED


class MissingTool(ErasecError):
    """An optional package or program that a command needs is not installed."""

    exit_code = TOOL_MISSING


def reason(error: BaseException) -> str:
    """What an exception of a library says, as the ``why`` of an ErasecError: its first line, or words for what it has
    none for. ``--verbose`` prints the whole exception."""
    if isinstance(error, KeyError) and error.args:
        return f"{shown(error.args[0])} is missing or not known"
    if isinstance(error, (TypeError, AttributeError, IndexError, AssertionError)):
        return "a value is of another type or size than its reader expects"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# What RuntimeErrors say where an allocation fails: CUDA, MPS, and the allocators of torch and oneDNN on a CPU.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_cpu", "could not allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated, on the host or on a device. Imports no library."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)
    )


def suggestion(name: str, options: Iterable[str]) -> str:
    """A half sentence that suggests the name in ``options`` closest to ``name``, or lists all of them."""
    options = sorted(options)
    matches = difflib.get_close_matches(name[:LONGEST_VALUE], options, n=1, cutoff=0.5)  # slow for long texts
    return f"did you mean {matches[0]!r}?" if matches else f"there are: {', '.join(options)}"


def require_modules(what: str, modules: Sequence[str], extra: str) -> None:
    """Raise MissingTool if one of the ``modules`` is not installed. ``extra`` is the extra of erasec that installs it.

    ``what`` is what needs them, as the subject of the error.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise MissingTool(
            f"{what} needs {' and '.join(missing)}", why="not installed", fix=f'pip install "erasec[{extra}]"'
        )
