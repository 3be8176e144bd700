"""examples/oci_release.py against a registry of its own: Debian's package docker-registry."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bundles import bytes_of, example, free_port, make, wait_for

from erasec.checkpoint import manifest
from erasec.errors import CheckFailed, ErasecError
from erasec.recipe.recipe import Publish

pytestmark = pytest.mark.network  # oras is no dependency: pip install oras
oras = pytest.importorskip("oras.client", reason="oras is not installed: pip install oras")
REGISTRY = shutil.which("docker-registry")


@pytest.fixture(scope="module")
def module(root: Path) -> ModuleType:
    return example(root, "oci_release")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A real registry that keeps its blobs in a folder."""
    if REGISTRY is None:
        pytest.skip("no registry is installed: apt-get install docker-registry")
    port = free_port()
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(config))  # JSON is YAML
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([REGISTRY, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    try:
        wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_a_bundle_goes_to_the_registry_and_comes_back(
    registry: str, module: ModuleType, random_folder: Path, tmp_path: Path
) -> None:
    out = make(random_folder, tmp_path / "out", targets=("edit",), publish=Publish())
    name = f"{registry}/models/sd"
    digest = module.push(out, f"{name}:1", insecure=True)
    stored = oras.OrasClient(insecure=True).get_manifest(f"{name}:1")
    files = bytes_of(out)
    titles = [layer["annotations"][module.TITLE] for layer in stored["layers"]]
    assert sorted(titles) == sorted(files) and len(titles) > 10
    assert stored["annotations"]["erasec.outcome"] == "not judged"
    assert stored["annotations"]["erasec.manifest"] == f"sha256:{manifest.read(out)[1]}"
    assert stored["config"]["mediaType"] == module.REPORT and stored["config"]["size"] == len(files["report.json"])
    module.pull(f"{name}@{digest}", tmp_path / "got", insecure=True)
    assert bytes_of(tmp_path / "got") == files
    assert module.push(out, f"{name}:1", insecure=True) == digest  # the same bundle is the same artifact


def test_what_was_changed_in_the_registry_is_not_accepted(
    registry: str, module: ModuleType, random_folder: Path, tmp_path: Path
) -> None:
    """Somebody who may write to the registry replaces one layer."""
    out = make(random_folder, tmp_path / "out")
    module.push(out, f"{registry}/models/sd:1", insecure=True)
    client = oras.OrasClient(insecure=True)
    stored = client.get_manifest(f"{registry}/models/sd:1")
    layers = {layer["annotations"][module.TITLE]: layer for layer in stored["layers"]}
    card, other = layers["README.md"], layers["recipe.toml"]
    card["digest"], card["size"] = other["digest"], other["size"]
    client.upload_manifest(stored, client.get_container(f"{registry}/models/sd:1"))
    with pytest.raises(CheckFailed, match=r"README\.md is not the file that was built"):
        module.pull(f"{registry}/models/sd:1", tmp_path / "got", insecure=True)


def test_what_is_damaged_or_can_undo_the_erasure_is_not_pushed(
    registry: str, module: ModuleType, random_folder: Path, tmp_path: Path
) -> None:
    out = make(random_folder, tmp_path / "out", targets=("edit",))
    with pytest.raises(ErasecError, match="edit can undo the erasure"):
        module.push(out, f"{registry}/models/sd:1", insecure=True)
    (out / "README.md").write_text("changed")
    with pytest.raises(CheckFailed, match=r"README\.md is not the file that was built"):
        module.push(out, f"{registry}/models/sd:1", insecure=True)
    assert not (tmp_path / "registry").exists()
