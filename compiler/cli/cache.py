"""The command ``erasec cache``: what is stored, and how to make room."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from erasec.checkpoint import store
from erasec.checkpoint.disk import parse_size, size
from erasec.cli import output
from erasec.cli.options import JSON, VERBOSE, report_errors
from erasec.errors import CHECK_FAILED, ErasecError, suggestion
from erasec.progress import bar, note

ACTIONS = ("list", "prune", "verify")
DAY = 86400.0


def cache(
    action: Annotated[str, typer.Argument(metavar="|".join(ACTIONS))],
    limit: Annotated[
        str | None, typer.Option("--max", metavar="SIZE", help="prune: to at most so much, such as 5GB")
    ] = None,
    days: Annotated[float, typer.Option("--days", min=0, help="prune: what was not used for so many days")] = 0.0,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="only entries of this kind; may be repeated")] = None,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Show what earlier builds stored for later ones, make room, or find damaged entries."""
    with report_errors(verbose):
        if action not in ACTIONS:
            raise ErasecError(f"there is no action {action!r}", why=suggestion(action, ACTIONS))
        kinds = tuple(kind or store.KINDS)
        if unknown := [name for name in kinds if name not in store.KINDS]:
            raise ErasecError(f"nothing is stored as {unknown[0]!r}", why=suggestion(unknown[0], store.KINDS))
        if action == "list":
            _list(kinds, as_json)
        elif action == "prune":
            _prune(kinds, limit, days, as_json)
        else:
            _verify(kinds, as_json)


def _list(kinds: tuple[str, ...], as_json: bool) -> None:
    entries = store.entries(kinds)
    rows: list[dict[str, Any]] = []
    for name in kinds:
        own = [entry for entry in entries if entry.kind == name]
        used = max((entry.used for entry in own), default=0.0)
        rows.append({"kind": name, "entries": len(own), "bytes": sum(entry.bytes for entry in own), "used": used})
    if as_json:
        print(json.dumps({"folder": str(store.cache_folder()), "limit": store.limit(), "kinds": rows}, indent=2))
        return
    cells = [
        [row["kind"], f"{row['entries']}", size(row["bytes"]), _ago(row["used"]), store.KINDS[row["kind"]]]
        for row in rows
    ]
    output.table(["kind", "entries", "size", "last used", "what"], cells)
    total = size(sum(entry.bytes for entry in entries))
    print(f"{store.cache_folder()}: {total} of at most {size(store.limit())} ({store.LIMIT})")


def _ago(used: float) -> str:
    days = (time.time() - used) / DAY
    return "–" if not used else "today" if days < 1 else f"{days:.0f} days ago"


def _prune(kinds: tuple[str, ...], limit: str | None, days: float, as_json: bool) -> None:
    if limit is None and not days:
        raise ErasecError(
            "nothing says what to remove", fix="give a size that may stay, --max 5GB, or an age, --days 30"
        )
    # "0" is everything, which parse_size takes for a typing error.
    bound = 0 if limit == "0" else parse_size(limit, "--max ") if limit is not None else 2**63
    removed = store.prune(bound, days * DAY, kinds)
    _print_removed(removed, as_json)


def _verify(kinds: tuple[str, ...], as_json: bool) -> None:
    entries, damaged = store.entries(kinds), []
    with bar("verify", len(entries)) as advance:
        for entry in entries:
            if not entry.is_whole():
                damaged.append(entry)
            advance(note=entry.kind)
    removed = store.remove_damaged(damaged)
    left = [entry for entry in damaged if entry not in removed and not entry.is_whole()]
    if left:
        note(f"damaged entries that stay: {len(left)}, as the cache is in use or another user's; no build uses them")
    _print_removed(removed, as_json, f"{len(entries) - len(removed) - len(left)} of {len(entries)} entries are whole")
    if removed or left:
        raise typer.Exit(CHECK_FAILED)


def _print_removed(removed: list[store.Entry], as_json: bool, first: str = "") -> None:
    if as_json:
        print(json.dumps([{"kind": entry.kind, "path": str(entry.path), "bytes": entry.bytes} for entry in removed]))
        return
    total = size(sum(entry.bytes for entry in removed))
    print("; ".join(filter(None, [first, f"{len(removed)} entries removed, {total}"])))
    for entry in removed[: output.LISTED]:
        print(f"  {entry.kind}/{entry.path.name}")
    if len(removed) > output.LISTED:
        print(f"  and {len(removed) - output.LISTED} more")
