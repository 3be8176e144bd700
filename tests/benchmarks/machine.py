"""What benchmarks say of the machine and of their own process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Benchmarks run as scripts, and random_models lies beside the tests.
sys.path.append(str(Path(__file__).resolve().parents[1]))

Record = dict[str, Any]


def status(name: str) -> float:
    """A size in MB that the kernel tells of this process, such as VmRSS or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def about() -> Record:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": model,
        "cores": os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "avx2": "avx2" in cpu,
        "avx512": "avx512f" in cpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }


def step(run: Callable[[], Record | None], written: str) -> Record:
    """Time ``run`` in this process, and add what it tells; ``written`` is the file or folder that it writes, or ""."""
    start = time.perf_counter()
    extra = run() or {}
    seconds = time.perf_counter() - start
    if written:
        flush(Path(written))
    return {"seconds": seconds, "durable": time.perf_counter() - start, "peak_mb": status("VmHWM"), **extra}


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on disk."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fresh(benchmark: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Record:
    """What a step of ``benchmark``, a file, tells of itself in a fresh process, and how long that took as a whole."""
    start = time.perf_counter()
    command = [sys.executable, benchmark, "--step", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(f"step {' '.join(arguments)} failed with exit code {done.returncode}")
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record | {"process": time.perf_counter() - start}
