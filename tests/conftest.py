"""Fixtures that all tests share: the installed package is this checkout, and one random model serves the whole run."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Set before torch is imported: spinning idle threads, or more threads than cores, double the time of small models.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 4)))
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, min((os.cpu_count() or 1) // int(workers), 4)))
os.environ.setdefault("ERASEC_THREADS", os.environ["OMP_NUM_THREADS"])

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # Background jobs of a shell inherit that Ctrl-C is ignored; the tests of interrupts need its usual effect.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = importlib.util.find_spec("erasec")
    if spec is None or spec.origin is None:
        pytest.exit("erasec is not installed: run pip install -e .", returncode=4)
    if Path(spec.origin).resolve().parent != ROOT / "compiler":
        pytest.exit(f"the installed erasec is {spec.origin}, not this checkout: run pip install -e .", returncode=4)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache for the whole run: each graph is traced once, and none comes from another version of erasec.

    Edits are not stored: a test that replaces what a pass does would otherwise get, or leave, that of another test.
    """
    from erasec.commands.solved import Solver

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"  # one for all workers
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASEC_CACHE", str(folder))
        patch.setattr(Solver, "_key", lambda *_: "")
        yield folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in glyphs' layout with random float16 weights, for tests of formats and algebra."""
    import torch
    from random_models import random_pipeline

    folder = tmp_path_factory.mktemp("random")
    random_pipeline(folder, dtype=torch.float16)
    return folder


@pytest.fixture(scope="module")
def base(random_folder: Path) -> Any:
    """The random model. Models do not change, so one serves a whole module."""
    from erasec.model import loading

    return loading.load(str(random_folder))


@dataclass(frozen=True)
class Variant:
    """A model with one edit: its checkpoint, the model that it is a variant of, its edit file with the edited tensors,
    another edit file without them, and its ONNX folder."""

    folder: Path
    origin: Any
    edit: Path
    plain: Path
    onnx: Path


@pytest.fixture(scope="session")
def variant(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Variant]:
    """Variants of the random model by name, each with a different edit of the same 14 tensors."""
    import torch

    from erasec.base import Context
    from erasec.checkpoint.folder import Folder
    from erasec.commands import build
    from erasec.graphs import link
    from erasec.model import loading
    from erasec.model.edit import Dense, Edit
    from erasec.targets.edit_file import EditFile

    variants: dict[str, Variant] = {}

    def variant(name: str) -> Variant:
        if name not in variants:
            base, root = loading.load(str(random_folder)), tmp_path_factory.mktemp(f"variant-{name}")
            rng = torch.Generator().manual_seed(sum(name.encode()))
            deltas = {site: Dense(0.05 * torch.randn(site.shape, generator=rng)) for site in base.select("cross", "kv")}
            edited = base.with_edit(Edit(deltas, "by hand", (name,), ""))
            edited.source.write(root / "hf", edited.merged(), False)
            for kind in (True, False):
                EditFile(tensors=kind).export(edited, root / f"edit-{kind}", Context())
            origin = build.edit_origin(edited)
            link.write_onnx(Folder(root / "hf"), root / "onnx", origin=origin)
            files = (next((root / f"edit-{kind}").iterdir()) for kind in (True, False))
            variants[name] = Variant(root / "hf", origin, *files, root / "onnx")
        return variants[name]

    return variant
