"""What decides a result besides a model and options: erasec's code, the versions of libraries, and files by name."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from erasec.checkpoint.safetensors import file_digest

LIBRARIES = ("torch", "diffusers", "transformers")  # which compute whatever a model computes
CODE = (".py", ".toml", ".j2", ".csv")  # the suffixes of erasec's code, tables and templates
LINKED = ("passes", "targets")  # folders that are links in a checkout, which rglob does not follow


@cache
def code_digest() -> str:
    """The digest of erasec's own code, tables and templates: a change of any may change what it makes."""
    root = Path(str(resources.files("erasec")))
    folders = (root, *(root / name for name in LINKED))
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix in CODE}
    return hashlib.sha256("".join(map(file_digest, sorted(files))).encode()).hexdigest()


def source_digest(kind: type) -> str:
    """The digest of the file that defines a class, which may be of another package; "" where there is none."""
    file = inspect.getsourcefile(kind)
    return file_digest(Path(file)) if file else ""


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution; "" where it is not installed."""
    result = {}
    for name in names:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = ""
    return result


def requirements() -> list[str]:
    """The distributions that erasec uses, those of its extras included, by erasec's own metadata."""
    try:
        lines = metadata.requires("erasec") or []
    except metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[\w.-]+", line) for line in lines if not re.search(r"extra\s*==\s*['\"]dev['\"]", line))
    return sorted({name[0] for name in names if name})


def named_files(text: str) -> list[Path]:
    """The file that ``text`` names, or all files in the folder that it names. None where it is not the name of one,
    as with a phrase, or a text that no path can be."""
    try:
        path = Path(text).expanduser()
        file, folder = path.is_file(), bool(text) and path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long; a home of nobody; a NUL
        return []
    return sorted(inside for inside in path.rglob("*") if inside.is_file()) if folder else [path] if file else []


def file_digests(texts: Iterable[object]) -> dict[str, str]:
    """The digests of the files that ``texts`` name, by path. What is no text names none."""
    files = {file for text in texts if isinstance(text, str) for file in named_files(text)}
    return {str(file): file_digest(file) for file in sorted(files)}
