"""How fast a device is: measured in ten seconds by ``erasec doctor --measure`` and cached, or assumed for its kind."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erasec.checkpoint.disk import DiskFull, size
from erasec.checkpoint.inputs import versions
from erasec.checkpoint.safetensors import atomic_write
from erasec.checkpoint.store import cache_folder, unusable_is_noted
from erasec.model.threads import chosen_threads, fixed_threads
from erasec.tensorrt.devices import query

FILE = "speed.json"
SECONDS = 2.0  # of each of the four parts
WRITTEN = 2**26  # bytes of one write to the disk


@dataclass(frozen=True)
class Speed:
    """``operations`` a second in large networks; seconds of one ``layer`` of a network that is too small to compute
    long; ``double``-precision operations a second in decompositions on the CPU; and ``disk`` bytes written a second."""

    operations: float
    layer: float
    double: float
    disk: float


# Assumed where nothing was measured: the slowest and the fastest device of a kind, a laptop of two cores and a server
# of many, a GPU of 8 GB and a large one. None of these numbers was measured on such a device.
ASSUMED = {
    "cpu": (Speed(3e10, 1.5e-4, 2e9, 1e8), Speed(6e11, 2e-5, 3e10, 2e9)),
    "mps": (Speed(1e12, 2e-4, 5e9, 5e8), Speed(1e13, 3e-5, 3e10, 3e9)),
    "cuda": (Speed(8e12, 1e-4, 2e9, 1e8), Speed(2.5e14, 1e-5, 3e10, 2e9)),
}
# A measurement lasts seconds, and a build minutes beside other programs: times from half to twice of it are expected.
SLOWER, FASTER = 0.5, 1.7


def identity(device: str) -> str:
    """What a measurement holds for: the name of the device, its threads, and the version of torch. Loads no library."""
    name = _cpu() if not device.startswith("cuda") else _gpu(device)
    torch = versions(("torch",))["torch"] or "none"
    return f"{device.partition(':')[0]}, {name}, {os.cpu_count()} cores, {chosen_threads()} threads, torch {torch}"


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: str) -> str:
    names = [name for name, _ in query("memory.total")]
    index = int(device.partition(":")[2] or 0)
    return names[index] if index < len(names) else "GPU"


def known(device: str) -> Speed | None:
    """The measurement of this device, from the cache; None where there is none that can be read."""
    try:
        stored = json.loads((cache_folder() / FILE).read_text(encoding="utf-8"))[identity(device)]
        speed = Speed(**{name: float(value) for name, value in stored.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return speed if all(0 < value < float("inf") for value in asdict(speed).values()) else None


def bounds(device: str) -> tuple[Speed, Speed, str]:
    """The slowest and the fastest speed that are to be expected of a device, and where they come from."""
    if (measured := known(device)) is not None:
        return _times(measured, SLOWER), _times(measured, FASTER), "estimate from a measurement of this device"
    kind = device.partition(":")[0]
    how = f"estimate for any {kind}, not measured on this machine: erasec doctor --measure takes ten seconds"
    return *ASSUMED[kind], how


def measured(device: str) -> str:
    """Measure a device and describe the result."""
    return f"{device}: {describe(measure(device))}"


def describe(speed: Speed) -> str:
    """A measurement as text."""
    return (
        f"{speed.operations / 1e9:.3g} billion operations a second, {1e6 * speed.layer:.3g} microseconds for a small "
        f"layer, {speed.double / 1e9:.3g} billion in double precision, {size(speed.disk)} written a second"
    )


def _times(speed: Speed, factor: float) -> Speed:
    return Speed(speed.operations * factor, speed.layer / factor, speed.double * factor, speed.disk * factor)


def measure(device: str) -> Speed:
    """Measure a device for about eight seconds, and keep the result in the cache where that can be written."""
    with fixed_threads():
        speed = Speed(_operations(device), _layer(device), _double(), _disk())
    with unusable_is_noted():
        path = cache_folder() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            others = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            others = {}
        content = {**(others if isinstance(others, dict) else {}), identity(device): asdict(speed)}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return speed


def _rate(call: Callable[[], object], device: str) -> float:
    """Calls a second: the best of several rounds, as other programs only ever make a round slower."""
    import torch

    def finished() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    count, best, began = 1, 0.0, finished()
    while (start := finished()) - began < SECONDS:
        for _ in range(count):
            call()
        seconds = max(finished() - start, 1e-9)
        best = max(best, count / seconds)
        count = max(1, min(2 * count, int(SECONDS / 8 * best)))
    return best


def _operations(device: str) -> float:
    """Operations a second in a block of Stable Diffusion's UNet: a convolution, two products and an attention."""
    import torch

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows = 4 if device.startswith("cuda") else 1

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    image, kernel = random(rows, 320, 64, 64), random(320, 320, 3, 3)
    tokens, wide, narrow = random(rows, 4096, 320), random(2560, 320), random(320, 2560)
    heads = random(rows, 8, 1024, 80)

    @torch.no_grad()
    def block() -> None:
        torch.nn.functional.conv2d(image, kernel, padding=1)
        torch.nn.functional.linear(torch.nn.functional.linear(tokens, wide), narrow)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    operations = 2 * 9 * 320 * 320 * 4096 + 2 * 2 * 4096 * 320 * 2560 + 4 * 1024 * 1024 * 640
    return rows * operations * _rate(block, device)


def _layer(device: str) -> float:
    """Seconds of a layer of a small network, with its norm and activation."""
    import torch
    from torch.nn import functional

    image, kernel = torch.randn(4, 32, 8, 8, device=device), torch.randn(32, 32, 3, 3, device=device)

    @torch.no_grad()
    def layer() -> None:
        functional.silu(functional.group_norm(functional.conv2d(image, kernel, padding=1), 8))

    return 1 / _rate(layer, device)


def _double() -> float:
    import torch

    size = 768
    root = torch.randn(size, size, dtype=torch.float64)
    matrix = root @ root.T + size * torch.eye(size, dtype=torch.float64)
    return size**3 / 3 * _rate(lambda: torch.linalg.cholesky(matrix), "cpu")


def _disk() -> float:
    """Bytes a second that are written to the disk of the cache, or to that of temporary files."""
    content = os.urandom(WRITTEN // 64) * 64
    folder = None
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder if folder and os.access(folder, os.W_OK) else None) as file:
            began, written = time.perf_counter(), 0
            while time.perf_counter() - began < SECONDS / 2:
                file.seek(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                written += WRITTEN
            return written / (time.perf_counter() - began)
    except (OSError, DiskFull):
        return ASSUMED["cpu"][0].disk
