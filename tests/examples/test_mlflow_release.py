"""examples/mlflow_release.py against a tracking server of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from bundles import bytes_of, example, free_port, make, wait_for

from erasec.checkpoint import manifest
from erasec.commands.verify import verify
from erasec.errors import CheckFailed
from erasec.recipe.recipe import Limits, Publish

pytestmark = pytest.mark.network  # MLflow is no dependency: pip install mlflow
mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow")


@pytest.fixture(scope="module")
def module(root: Path) -> ModuleType:
    return example(root, "mlflow_release")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with a database and a folder for artifacts."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'runs.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes less
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: it does not end them itself
        process.wait(30)


def test_a_bundle_is_logged_and_comes_back(
    server: str, module: ModuleType, random_folder: Path, tmp_path: Path
) -> None:
    out = make(random_folder, tmp_path / "sd-without-church", targets=("edit",), publish=Publish())
    report = json.loads((out / "report.json").read_text())
    mlflow.set_tracking_uri(server)
    version = module.log(out)
    run = mlflow.get_run(version.run_id)
    assert (version.name, int(version.version)) == ("sd-without-church", 1)
    assert run.data.tags["outcome"] == "not judged" and run.data.tags["undoing"] == ""
    assert run.data.tags["manifest"] == manifest.read(out)[1] == version.tags["manifest"]
    assert run.data.params["erase"] == "church" and run.data.params["uce.ridge"] == str(
        report["applied"][0]["params"]["ridge"]
    )
    finite = [check for check in report["checks"] if check["value"] is not None]
    assert finite and all(f"check/{check['name']}" in run.data.metrics for check in finite)
    uri = mlflow.MlflowClient().get_model_version_download_uri("sd-without-church", "1")
    got = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "got")))
    assert bytes_of(got) == bytes_of(out) and verify(got).wrong == ""
    assert int(module.log(out).version) == 2


def test_a_rejected_or_damaged_build_is_not_logged(
    server: str, module: ModuleType, random_folder: Path, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(server)
    with pytest.raises(CheckFailed):
        make(random_folder, tmp_path / "out", checks=Limits(pictures=0, require_judge=True))
    with pytest.raises(CheckFailed, match="the build was rejected"):
        module.log(tmp_path / "out" / manifest.REJECTED, experiment="refused")
    whole = make(random_folder, tmp_path / "whole")
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    (damaged / "README.md").write_text("changed")
    with pytest.raises(CheckFailed, match=r"README\.md is not the file that was built"):
        module.log(damaged, experiment="refused")
    assert mlflow.get_experiment_by_name("refused") is None
    module.log(whole, experiment="refused")  # the control
    assert mlflow.get_experiment_by_name("refused") is not None


def test_names_of_metrics_are_what_the_server_takes(module: ModuleType) -> None:
    rates = [{"group": "name", "looked_for": "Ada's car, <1>", "before": 1.0, "after": 0.25}]
    checks = [{"name": "finite", "value": None}, {"name": "kept/hits", "value": 0.5}]
    assert module.metrics({"rates": rates, "checks": checks}) == {
        "name/Ada_s car_ _1_/before": 1.0,
        "name/Ada_s car_ _1_/after": 0.25,
        "check/kept/hits": 0.5,
    }


def test_the_whole_example_is_eighty_lines(root: Path) -> None:
    assert len((root / "examples/mlflow_release.py").read_text().splitlines()) <= 80
