"""The NVIDIA GPUs of this machine, as nvidia-smi lists them. Imports no library."""

from __future__ import annotations

import shutil
import subprocess


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
