"""``erasec doctor``: what this machine can run, and the pip command for each missing library.

It imports none of the libraries that it looks for.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from erasec.checkpoint.disk import size
from erasec.checkpoint.inputs import versions
from erasec.model.available import available_memory
from erasec.tensorrt.devices import query

CORE = ("erasec", "torch", "diffusers", "transformers", "huggingface_hub", "numpy")
OPTIONAL = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "polygraphy": "trt-rtx",
    "tensorrt_rtx": "trt-rtx",
    "tensorrt": "trt",
    "nudenet": "nudenet",
    "model_signing": "sign",
}


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``detail`` is a version or a reason; ``fix`` is an instruction if it is not available."""

    name: str
    available: bool
    detail: str
    fix: str = ""
    required: bool = False


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    return versions((package,))[package] or None


def examine(folder: Path) -> list[Finding]:
    """Findings about this machine; builds would be written to ``folder``. Uses no network and loads no library."""
    findings = [Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_package(name, "pip install --upgrade erasec", required=True) for name in CORE]
    findings += [_package(name, f'pip install "erasec[{extra}]"') for name, extra in OPTIONAL.items()]
    findings += [_cuda(), _memory(), _disk(folder), _hub()]
    return findings


def _package(name: str, fix: str, required: bool = False) -> Finding:
    installed = version(name)
    if installed is not None:
        return Finding(name, True, installed, required=required)
    return Finding(name, False, "not installed", fix, required)


def accelerator_build() -> str:
    """The platform that the installed torch is built for besides the CPU, such as "CUDA 13.0"; "" for none.

    It is read from torch's file of versions, as importing torch takes a second.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    built = re.search(r"^(cuda|hip)\b.*=\s*['\"](.+)['\"]", text, re.MULTILINE)
    return f"{'CUDA' if built[1] == 'cuda' else 'ROCm'} {built[2]}" if built else ""


def _cuda() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("cuda", False, "torch is not installed")
    built, devices = accelerator_build(), _devices()
    if not built:
        detail = f"torch is a CPU build{f', the machine has {devices}' if devices else ''}; builds run on cpu"
        fix = "install a CUDA build of torch: see pytorch.org" if devices else ""
        return Finding("cuda", False, detail, fix)
    if not devices:
        return Finding("cuda", False, f"torch is built for {built}, but there is no device; builds run on cpu")
    return Finding("cuda", True, f"{devices}; torch is built for {built}")


def _devices() -> str:
    """Names and memory of the NVIDIA GPUs; "" where there are none."""
    return "; ".join(f"{name}, {memory}" for name, memory in query("memory.total"))


def _memory() -> Finding:
    free = available_memory()
    return Finding("memory", True, f"{f'{size(free)} free, ' if free is not None else ''}{os.cpu_count()} cores")


def _disk(folder: Path) -> Finding:
    return Finding("disk", True, f"{size(shutil.disk_usage(folder).free)} free in {folder}")


def _hub() -> Finding:
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    if switches:
        detail = f"off ({', '.join(switches)} is set); cached models, folders and bundled models work"
        return Finding("hub", False, detail, f"unset {' '.join(switches)}   to download models")
    return Finding("hub", True, "downloads are allowed (not tried); bundled models need no network")
