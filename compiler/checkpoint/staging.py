"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden folder next to ``out``. It is removed when the block ends, with or without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    stage.chmod(0o755)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def restore_folder(out: Path) -> None:
    """Restore the earlier folder if a ``replace_folder`` was killed after it had moved that folder away."""
    old = _backup_path(out)
    if old.exists() and not out.exists():
        os.replace(old, out)


def _backup_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def replace_folder(stage: Path, out: Path) -> None:
    """Move ``stage`` to ``out``. An earlier folder there is deleted at the end, or restored if the move fails."""
    restore_folder(out)
    old = _backup_path(out)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


NAME_BYTES = 120


def file_name(words: Iterable[str]) -> str:
    """Join ``words`` to a file name of at most NAME_BYTES bytes, with letters, digits, "_", "." and "-" only.

    The name contains no path separator and does not start with a dot. It is empty if the words have no letter or digit.
    """
    name = "-".join(filter(None, (re.sub(r"[^\w.]+", "-", word).strip("-.") for word in words)))
    return name.encode()[:NAME_BYTES].decode(errors="ignore").rstrip("-.")
