"""Which of the processes of ``accelerate launch`` this one is. Loads no library where there is only one."""

from __future__ import annotations

import os


def is_main() -> bool:
    """Whether this process writes and prints. The other processes of ``accelerate launch`` only train with it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
