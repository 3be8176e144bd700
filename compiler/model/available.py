"""The memory that this machine has left."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def available_memory() -> int | None:
    """The bytes that this process may still take, within the limit of its container; None where it is not known."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        free = next(1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:")
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no container, another version of cgroups, or no limit
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(facts["file"])  # cached files make room
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)
