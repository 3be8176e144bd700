"""Small builds of a random model that no judge sees, a free port, and scripts of examples/ as modules."""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from erasec.commands import build, plan
from erasec.recipe.recipe import Limits, Recipe


def make(model: Path, out: Path, **fields: Any) -> Path:
    """Build ``model`` without the phrase "church" into ``out``. Paints nothing."""
    recipe = {"model": str(model), "erase": ("church",), "checks": Limits(pictures=0), "device": "cpu", **fields}
    build.run(plan.make_plan(Recipe(**recipe), out))
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def example(root: Path, name: str) -> ModuleType:
    """A script of examples/, imported."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", root / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, seconds: float = 120.0) -> None:
    """Wait until a server listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")
