"""The NVIDIA GPUs of this machine, as nvidia-smi lists them. Imports no library."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import takewhile


def query(field: str) -> list[tuple[str, str]]:
    """Name and ``field`` of every NVIDIA GPU, such as ("NVIDIA L4", "8.9") for the field compute_cap.

    Empty where nvidia-smi is not installed or fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu=name,{field}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in output.splitlines() if "," in line]
    return [(name.strip(), value.strip()) for name, value in rows]


def gpus() -> list[tuple[str, str]]:
    """Name and compute capability ("89" for 8.9) of every NVIDIA GPU."""
    return [(name, capability.replace(".", "")) for name, capability in query("compute_cap")]


def visible() -> list[str]:
    """The NVIDIA GPUs that this process may use, as entries of CUDA_VISIBLE_DEVICES: those that it lists, up to the
    first that is no device; where it is not set, all of them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(len(query("name")))]
    return list(takewhile(lambda entry: entry not in ("", "-1"), (entry.strip() for entry in listed.split(","))))


def visible_models() -> list[str]:
    """The models of these GPUs with their compute capabilities, each once, such as "NVIDIA L4 89"."""
    every, entries = gpus(), visible()
    if all(entry.isdecimal() for entry in entries):  # others are the UUIDs of GPUs
        every = [every[int(entry)] for entry in entries if int(entry) < len(every)]
    return sorted({" ".join(row) for row in every})
