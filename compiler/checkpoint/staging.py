"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that is gone when the block ends, however it ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    stage.chmod(0o755)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def restore(out: Path) -> None:
    """Bring back what stepped aside for a ``put`` that was killed before it was done."""
    old = _aside(out)
    if old.exists() and not out.exists():
        os.replace(old, out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def put(stage: Path, out: Path) -> None:
    """Put ``stage`` where ``out`` is. An earlier build there steps aside, comes back if that fails, and goes last."""
    restore(out)
    old = _aside(out)
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
