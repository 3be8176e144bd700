"""What benchmarks say of the machine and of their own process."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def status(name: str) -> float:
    """A size in MB that the kernel tells of this process, such as VmRSS or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def about() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    return {
        "system": platform.system(), "machine": platform.machine(), "cpu": model, "cores": os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "avx2": "avx2" in cpu, "avx512": "avx512f" in cpu, "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }  # fmt: skip
