"""The page of a matrix: which concept on which model, passed or not, with a picture before and after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from erasec.checkpoint.manifest import REJECTED
from erasec.documents import read_json
from erasec.errors import ErasecError
from erasec.reporting.read import PAGE, REPORT
from erasec.reporting.report import templates, write_text

SCHEMA = "erasec.matrix/1"
ORDER = ("rejected", "failed", "killed", "stopped", "not built", "not judged", "passed")


@dataclass(frozen=True)
class Row:
    """One build: its folder, what it was to erase, its state, and why it is not there, "" if it is. ``seconds`` is the
    wall time of its last run, ``attempts`` how often it was started in it, and ``where`` the host."""

    name: str
    model: str
    concepts: tuple[str, ...]
    variant: str
    state: str
    seconds: float = 0.0
    why: str = ""
    attempts: int = 0
    where: str = ""


def write_page(rows: list[Row], out: Path) -> None:
    """Write ``matrix.html`` and ``matrix.json`` into ``out``, where the builds are. Each is written completely or not
    at all."""
    cells = [_cell(row, out) for row in rows]
    counts = {state: sum(row.state == state for row in rows) for state in ORDER}
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "counts": {state: count for state, count in counts.items() if count},
        "builds": [{key: value for key, value in cell.items() if key != "pictures"} for cell in cells],
    }
    page = (
        templates()
        .get_template("matrix.html.j2")
        .render(
            counts=facts["counts"],
            cells=cells,
            models=list(dict.fromkeys(row.model for row in rows)),
            variants=list(dict.fromkeys(row.variant for row in rows)),
            total=len(rows),
        )
    )
    write_text(out / "matrix.html", page)
    write_text(out / "matrix.json", json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _cell(row: Row, out: Path) -> dict[str, Any]:
    """What the page shows of a build: its row, the figures of its report, and the first two pictures of its page."""
    folder = out / row.name / REJECTED if row.state == "rejected" else out / row.name
    cell: dict[str, Any] = {**asdict(row), "report": "", "summary": {}, "passes": [], "pictures": [], "verdict": ""}
    if row.state not in ("passed", "not judged", "rejected"):
        return cell
    try:
        report = read_json(folder / REPORT, dict[str, Any])
    except ErasecError:  # it was removed since
        return cell
    cell["summary"] = report.get("summary", {})
    cell["passes"] = list(dict.fromkeys(str(edit.get("by", "")) for edit in report.get("applied", [])))
    cell["verdict"] = str(report.get("verdict", ""))
    page = folder / PAGE
    if page.is_file():
        cell["report"] = page.relative_to(out).as_posix()
        cell["pictures"] = first_pictures(page.read_text(encoding="utf-8"))
    return cell


class _Pictures(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        source, about = named.get("src") or "", named.get("alt") or ""
        if tag == "img" and len(self.pictures) < 2 and source.startswith("data:image/png;base64,"):
            self.pictures.append((source, about))


def first_pictures(page: str) -> list[tuple[str, str]]:
    """The first pair of pictures in the report of a build, before and after, as data URIs with their descriptions."""
    parser = _Pictures()
    parser.feed(page)
    return parser.pictures if len(parser.pictures) == 2 else []
