"""The cache of cells: a reference is measured once for all audits, and an interrupted audit goes on where it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from erasec.audit.base import Cell, Rate
from erasec.checkpoint.owned import scratch_folder
from erasec.graphs.cache import cache_folder, unusable_is_noted

FOLDER = "audit"
DIGEST = 32  # bytes of a sha256


def load(name: str) -> list[Cell] | None:
    """The cells ``name``; None where they are not there, or their bytes have changed."""
    with unusable_is_noted():
        path = _path(name)
        content = path.read_bytes() if path.is_file() else b""
        if content and content[:DIGEST] == hashlib.sha256(content[DIGEST:]).digest():
            with np.load(io.BytesIO(content[DIGEST:]), allow_pickle=False) as arrays:
                rows: list[dict[str, Any]] = json.loads(str(arrays["cells"]))
                shown = [arrays[f"shown{number}"] for number in range(len(rows))]
            return [
                Cell(**{**row, "rate": Rate(**row["rate"]), "shown": picture})
                for row, picture in zip(rows, shown, strict=True)
            ]
    return None


def save(name: str, cells: Sequence[Cell]) -> None:
    """Write cells into the cache, whole or not at all. A cache that cannot be written is a note."""
    rows = [{key: value for key, value in asdict(cell).items() if key != "shown"} for cell in cells]
    pictures = {
        f"shown{number}": np.zeros((0, 1, 1, 3), np.uint8) if cell.shown is None else cell.shown
        for number, cell in enumerate(cells)
    }
    data = io.BytesIO()
    np.savez_compressed(data, **{"cells": np.array(json.dumps(rows)), **pictures})  # type: ignore[arg-type]
    content = data.getvalue()
    with unusable_is_noted():
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent) as scratch:
            (scratch / "cells").write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(scratch / "cells", path)


def _path(name: str) -> Path:
    return cache_folder() / FOLDER / name
