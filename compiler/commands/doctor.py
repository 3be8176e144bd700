"""What this machine can do, and the pip line for what it cannot. Imports none of the libraries that it looks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CORE = ("erasec", "torch", "diffusers", "transformers", "huggingface_hub", "numpy")
OPTIONAL = {
    "onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino",
    "polygraphy": "trt-rtx", "tensorrt_rtx": "trt-rtx", "tensorrt": "trt",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, whether it is there, what was found, and what to do where it is not."""

    name: str
    there: bool
    found: str
    fix: str = ""
    required: bool = False


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(folder: Path) -> list[Finding]:
    """Findings for this machine; ``folder`` is where builds would be written. Nothing is fetched, no library loaded."""
    found = [Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    found += [_package(name, "pip install --upgrade erasec", required=True) for name in CORE]
    found += [_package(name, f'pip install "erasec[{extra}]"') for name, extra in OPTIONAL.items()]
    found += [_cuda(), _memory(), _disk(folder), _hub()]
    return found


def _package(name: str, fix: str, required: bool = False) -> Finding:
    there = version(name)
    if there is not None:
        return Finding(name, True, there, required=required)
    return Finding(name, False, "not installed", fix, required)


def _cuda() -> Finding:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("cuda", False, "torch is not installed")
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda\b.*=\s*['\"](.+)['\"]", text, re.MULTILINE)
    devices = _devices()
    if built is None:
        found = f"torch is a CPU build{f', the machine has {devices}' if devices else ''}; builds run on cpu"
        fix = "install the CUDA build of torch, as pytorch.org says for this system" if devices else ""
        return Finding("cuda", False, found, fix)
    if not devices:
        return Finding("cuda", False, f"torch is built for CUDA {built[1]}, no device answers; builds run on cpu")
    return Finding("cuda", True, f"{devices}; torch is built for CUDA {built[1]}")


def _devices() -> str:
    """Names and memory of the NVIDIA devices, or nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in answer.splitlines() if line.strip())


def _memory() -> Finding:
    table = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if table.is_file() else None
    free = f"{int(match[1]) * 1024 / 1e9:.1f} GB free, " if match else ""
    return Finding("memory", True, f"{free}{os.cpu_count()} cores")


def _disk(folder: Path) -> Finding:
    return Finding("disk", True, f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}")


def _hub() -> Finding:
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    if switches:
        found = f"off ({', '.join(switches)} is set); models in its cache, folders and bundled ones work"
        return Finding("hub", False, found, f"unset {' '.join(switches)}   to fetch models")
    return Finding("hub", True, "models may be fetched (not tried); bundled ones need no network")
