"""Reads small text files that may be damaged or made to harm: JSON, TOML, CSV and plain text.

Every reader of such a file uses these functions. A file that is missing, too large, not UTF-8, a Git LFS pointer, of
another syntax, nested too deeply or of other content than its schema raises ErasecError.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from erasec.errors import ErasecError

T = TypeVar("T")

# The largest files that are read, in bytes. Of JSON, the vocabularies of tokenizers are the largest: T5's has 2.4 MB.
LARGEST = 64 * 1024 * 1024
# A recipe that a build writes holds every concept in full: 4 MiB for 1,700 names.
LARGEST_TOML = 16 * 1024 * 1024
# The deepest nesting of lists and tables. Libraries that get the content follow it by recursion.
DEEPEST = 48
# A key of TOML with more parts than that: tomllib needs time quadratic in their number.
PART = r"""(?:"[^"\n]*+"|'[^'\n]*+'|[\w-]++)[ \t]*+\.[ \t]*+"""
LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:{PART}){{{DEEPEST}}}""")
# How Git LFS begins the small file that it leaves in the place of a large one.
POINTER = b"version https://git-lfs.github.com/spec/"
FETCH = "fetch the file again"
# The columns of captions in a CSV file; the first that a file has is read.
CAPTIONS = ("prompt", "caption", "text")

# Fields of schemas.
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Source(NamedTuple):
    """How errors speak of a document: ``what`` it is, such as "the recipe"; ``where`` it is; how to ``fix`` it; and
    what it is if it cannot be used, such as "is no edit file" (``state``)."""

    what: str
    where: str = ""
    fix: str = FETCH
    state: str = ""

    def error(self, why: str, state: str = "cannot be read") -> ErasecError:
        """The error for a document that cannot be used; ``state`` is for a source without its own."""
        return ErasecError(f"{self.what} {self.state or state}", why=why, where=self.where, fix=self.fix)


def read_json(path: Path, kind: type[T], fix: str = FETCH) -> T:
    """The content of a JSON file, of the type ``kind``; see ``parse_json``. Raises ErasecError."""
    return parse_json(read_text(path, fix), kind, Source(path.name, str(path), fix))


def parse_json(text: str, kind: type[T], source: Source) -> T:
    """A value of the type ``kind`` from JSON: a dict, or another type that pydantic checks and makes, such as a
    dataclass. Numbers, texts and truth values are not converted into each other. Raises ErasecError."""
    try:
        content: T = _adapter(cast("Any", kind)).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            deep = "recursion limit" in first["msg"]
            reason = _too_deep() if deep else first["msg"].removeprefix("Invalid JSON: ")
            raise source.error(reason, "is not JSON") from error
        raise source.error(fault(error)) from error
    return _shallow(content, source)


def read_toml(path: Path, what: str, fix: str = "") -> dict[str, Any]:
    """The content of a TOML file; ``what`` names it in errors. Raises ErasecError."""
    source = Source(what, str(path), fix)
    return parse_toml(_decoded(path, source, LARGEST_TOML), source)


def parse_toml(text: str, source: Source) -> dict[str, Any]:
    """The content of TOML. Raises ErasecError."""
    if LONG_KEY.search(text):
        raise source.error(_too_deep())
    try:
        content = tomllib.loads(text)
    except RecursionError as error:
        raise source.error(_too_deep()) from error
    except ValueError as error:
        long = "set_int_max_str_digits" in str(error)
        raise source.error("a number has thousands of digits" if long else str(error), "is not TOML") from error
    return _shallow(content, source)


def read_text(path: Path, fix: str = FETCH) -> str:
    """The content of a UTF-8 file. Raises ErasecError."""
    return _decoded(path, Source(path.name, str(path), fix), LARGEST)


class Table(NamedTuple):
    """The names of the columns of a CSV file, and its rows by column; an empty or missing cell is ""."""

    columns: tuple[str, ...]
    rows: list[dict[str, str]]


def read_csv(path: Path, fix: str = FETCH) -> Table:
    """The content of a CSV file whose first line names the columns. Raises ErasecError."""
    source = Source(path.name, str(path), fix)
    text = _decoded(path, source, LARGEST).removeprefix("\ufeff")  # Excel writes a byte order mark
    if "\0" in text:
        raise source.error("it has a NUL byte")
    try:
        columns, *lines = [*csv.reader(StringIO(text, newline=""))] or [[]]
    except csv.Error as error:
        raise source.error(str(error)) from error
    rows = [[cell.strip() for cell in line] + [""] * (len(columns) - len(line)) for line in lines if line]
    return Table(tuple(columns), [dict(zip(columns, row, strict=False)) for row in rows])


def read_captions(path: Path) -> list[str]:
    """The captions of a text file, one per line, or of a CSV file with a column prompt, caption or text.

    Raises ErasecError for a file that cannot be read, has no such column or has no captions.
    """
    if path.suffix.lower() != ".csv":
        captions = [line.strip() for line in StringIO(read_text(path).removeprefix("\ufeff"), newline="")]
    else:
        columns, rows = read_csv(path)
        column = next((name for name in CAPTIONS if name in columns), None)
        if column is None:
            raise ErasecError(
                f"{path.name} has no column of captions",
                where=str(path),
                why=f"its columns are {', '.join(columns) or 'none'}; captions are in one of {', '.join(CAPTIONS)}",
            )
        captions = [row[column] for row in rows]
    if not (captions := [caption for caption in captions if caption]):
        raise ErasecError(f"{path.name} holds no captions", where=str(path))
    return captions


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file without empty ones and those that begin with "#"; ``what`` they are is for errors.

    Raises ErasecError for a file that cannot be read or has no such line, and for a line that is there twice.
    """
    lines = [line.strip() for line in StringIO(read_text(path).removeprefix("\ufeff"))]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ErasecError(f"{path.name} holds no {what}", where=str(path), fix="write one per line")
    if twice := next((line for line, count in Counter(lines).items() if count > 1), None):
        raise ErasecError(f"{path.name} has the line {twice!r} twice", where=str(path), fix="leave one of them out")
    return lines


def fault(error: ValidationError) -> str:
    """The first fault that pydantic found, with its key."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "missing":
        *outer, name = map(str, first["loc"])
        return f"{'.'.join(outer)}: it has no {name!r}" if outer else f"it has no {name!r}"
    key = ".".join(map(str, first["loc"]))
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{key}: {text}" if key else text


def refuse_pointer(path: Path, first: bytes) -> None:
    """Raise ErasecError if ``first``, the first bytes of the file ``path``, are those of a Git LFS pointer."""
    if first.startswith(POINTER):
        raise ErasecError(
            f"{path.name} is a Git LFS pointer",
            why="the repository was cloned without its large files, so this is a note of some lines about the file",
            where=str(path),
            fix="fetch the files: git lfs pull; or fetch the model with: hf download",
        )


def _decoded(path: Path, source: Source, largest: int) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise source.error("there is no such file" if missing else error.strerror or "it cannot be opened") from error
    refuse_pointer(path, data)
    if len(data) > largest:
        raise source.error(f"it is larger than {largest >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise source.error(f"it is not text in UTF-8 (byte {error.start})") from error


def _shallow(content: T, source: Source) -> T:
    """``content`` if it is not nested deeper than DEEPEST."""
    level: list[Any] = [content]
    for _ in range(DEEPEST + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return content
    raise source.error(_too_deep())


def _children(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, Mapping) else item if isinstance(item, list) else ()


def _too_deep() -> str:
    return f"its lists and tables are nested more than {DEEPEST} deep"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
