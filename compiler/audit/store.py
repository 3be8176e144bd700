"""The cache of cells: a reference is measured once for all audits, and an interrupted audit goes on where it was."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from erasec.audit.base import Cell, Rate
from erasec.checkpoint.store import read_entry, write_entry

FOLDER = "audit"


def load(name: str) -> list[Cell] | None:
    """The cells ``name``; None where they are not there, or their bytes have changed."""
    content = read_entry(FOLDER, name)
    if content is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        rows: list[dict[str, Any]] = json.loads(str(arrays["cells"]))
        shown = [arrays[f"shown{number}"] for number in range(len(rows))]
    return [
        Cell(**{**row, "rate": Rate(**row["rate"]), "shown": picture}) for row, picture in zip(rows, shown, strict=True)
    ]


def save(name: str, cells: Sequence[Cell]) -> None:
    """Write cells into the cache."""
    rows = [{key: value for key, value in asdict(cell).items() if key != "shown"} for cell in cells]
    pictures = {
        f"shown{number}": np.zeros((0, 1, 1, 3), np.uint8) if cell.shown is None else cell.shown
        for number, cell in enumerate(cells)
    }
    data = io.BytesIO()
    np.savez_compressed(data, **{"cells": np.array(json.dumps(rows)), **pictures})  # type: ignore[arg-type]
    write_entry(FOLDER, name, data.getvalue())
