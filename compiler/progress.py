"""Notes and a progress bar on stderr. Only the main process writes them, and the bar only in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from erasec.errors import printable


class Advance(Protocol):
    """Moves a bar by ``steps``. A ``note`` that is not empty replaces the text behind the bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """Show ``title`` and a bar of ``total`` steps. Yields the function that advances it."""
    if not sys.stderr.isatty() or not _is_main():
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            progress.advance(task, steps)
            if note:
                progress.update(task, note=printable(note))

        yield advance


@contextmanager
def without_library_warnings() -> Iterator[None]:
    """Silence what diffusers logs below the level of an error, within a block whose result is checked."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def note(text: str) -> None:
    """Print a note on stderr."""
    if _is_main():
        print(f" note: {printable(text)}", file=sys.stderr, flush=True)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def disable_library_bars() -> None:
    """Turn off the progress bars of diffusers and transformers, which draw one for each component that they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
