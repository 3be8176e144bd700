"""Which of the processes of ``accelerate launch`` this one is. Loads no library where there is only one."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes train together: those of ``accelerate launch``, or this one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes and prints. The other processes of ``accelerate launch`` only train with it."""
    if process_count() < 2:
        return True
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
