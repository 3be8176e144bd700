"""A build of glyphs, for all tests of runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from erasec.checkpoint.folder import Folder
from erasec.graphs.link import write_onnx
from erasec.model import loading
from erasec.runtime.bundle import Bundle, open_bundle


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a build of glyphs writes: onnx, and hf, which is the checkpoint."""
    out = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ERASEC_CACHE", str(out / "cache"))
        (out / "hf").symlink_to(loading.bundled_folder("glyphs"))
        write_onnx(Folder(out / "hf"), out / "onnx")
        yield out


@pytest.fixture(scope="session")
def opened(built: Path) -> Bundle:
    """The build in ONNX Runtime."""
    return open_bundle(built, "ort", threads=1)
