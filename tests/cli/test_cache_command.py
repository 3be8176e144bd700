"""``erasec cache``: what it lists, removes and reports."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from erasec.checkpoint import store
from erasec.cli.app import app


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEC_CACHE", str(tmp_path / "store"))
    for number, kind in enumerate(("pictures", "pictures", "audit")):
        store.write_entry(kind, f"{number}", bytes(1000))
        used = store.STARTED - 86400 * (10 - number)
        os.utime(store.cache_folder() / kind / f"{number}", (used, used))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["cache", *words])


def left() -> set[str]:
    return {entry.path.name for entry in store.entries()}


def test_the_list_counts_entries_and_bytes_by_kind() -> None:
    done = run("list", "--json")
    rows = {row["kind"]: row for row in json.loads(done.output)["kinds"]}
    assert rows.keys() == store.KINDS.keys()
    assert (rows["pictures"]["entries"], rows["pictures"]["bytes"]) == (2, 2 * (1000 + store.DIGEST))
    text = run("list").output
    assert "pictures" in text and "9 days ago" in text and "of at most 20 GB" in text


def test_pruning_keeps_what_was_used_last() -> None:
    done = run("prune", "--max", "1.1kB")
    assert done.exit_code == 0 and left() == {"2"} and "2 entries removed" in done.output
    run("prune", "--max", "0")
    assert left() == set()


def test_pruning_by_age_and_kind() -> None:
    assert run("prune", "--days", "8.5", "--kind", "audit").exit_code == 0 and left() == {"0", "1", "2"}
    run("prune", "--days", "8.5")
    assert left() == {"2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune",), "nothing says what to remove"),
        (("prune", "--max", "much"), "'much' is no size"),
        (("drop",), "there is no action 'drop'"),
        (("list", "--kind", "picture"), "did you mean 'pictures'"),
    ],
)
def test_what_cannot_be_done_is_said(words: tuple[str, ...], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2 and message in done.stderr and left() == {"0", "1", "2"}


def test_damaged_entries_are_removed_and_the_exit_code_says_so() -> None:
    assert run("verify").exit_code == 0 and left() == {"0", "1", "2"}
    file = store.cache_folder() / "pictures" / "1"
    file.write_bytes(file.read_bytes()[:-1])
    done = run("verify")
    assert done.exit_code == 3 and "2 of 3 entries are whole" in done.output and "pictures/1" in done.output
    assert left() == {"0", "2"} and run("verify").exit_code == 0


def test_a_limit_that_is_no_size_ends_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.LIMIT, "20gb")
    for words in (["cache", "list"], ["build", "glyphs", "--erase", "star"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and "'20gb' is no size" in done.stderr and f"{store.LIMIT}=8GB" in done.stderr


def test_damaged_entries_of_a_cache_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    file = store.cache_folder() / "pictures" / "1"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(store, "_exclusive", lambda handle: False)
    done = run("verify")
    assert done.exit_code == 3 and "2 of 3 entries are whole; 0 entries removed" in done.output
    assert "damaged entries that stay: 1" in done.stderr and left() == {"0", "1", "2"}
