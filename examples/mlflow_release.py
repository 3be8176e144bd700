"""Logs a finished bundle in MLflow: parameters, rates, checks, files, and a version of a registered model.

    pip install erasec mlflow
    python examples/mlflow_release.py sd14-without-nudity --uri http://localhost:5000

A bundle that `erasec verify` refuses, a rejected build among them, is not logged. The tag `manifest` is the sha256 by
which a later `erasec verify` of the downloaded files is compared.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import RestException

from erasec.checkpoint import manifest
from erasec.commands.verify import raise_for_fault, verify
from erasec.errors import ErasecError


def metrics(report: dict[str, Any]) -> dict[str, float]:
    """The rates of each group and label before and after the edit, and the value of each check."""
    rates = {f"{row['group']}/{row['looked_for']}/{side}": row[side] for row in report["rates"] for side in SIDES}
    checks = {f"check/{check['name']}": check["value"] for check in report["checks"]}
    named = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in (rates | checks).items()}
    return {name: float(value) for name, value in named.items() if value is not None}  # None is not finite


def log(bundle: Path, name: str = "", experiment: str = "erasec") -> Any:
    """Log a bundle as one run and register it as a version of the model ``name``. Returns the version."""
    raise_for_fault(verify(bundle), bundle)
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    tags = {
        "outcome": report["outcome"],
        "verdict": report["verdict"],
        "manifest": manifest.read(bundle)[1],
        "base_digest": report["model"]["digest"],
        "undoing": ", ".join(item["path"] for item in report["undoing"] if item["inside"]),
    }
    params = {
        "model": report["model"]["title"],
        "revision": report["model"]["revision"],
        "erase": ", ".join(concept["name"] for concept in report["concepts"]),
        "targets": ", ".join(item["target"] for item in report["written"]),
    }
    for step in report["applied"]:
        params |= {f"{step['by']}.{option}": value for option, value in step["params"].items()}
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=bundle.resolve().name, tags=tags) as run:
        mlflow.log_params(params)
        mlflow.log_metrics(metrics(report))
        mlflow.log_artifacts(str(bundle), "bundle")
    client, name = mlflow.MlflowClient(), name or bundle.resolve().name
    try:
        client.create_registered_model(name)
    except RestException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, f"{run.info.artifact_uri}/bundle", run.info.run_id, tags=tags)


SIDES = ("before", "after")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Log a bundle of erasec in MLflow.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--uri", default="http://localhost:5000", help="tracking server")
    parser.add_argument("--name", default="", help="registered model, by default the name of the folder")
    args = parser.parse_args()
    mlflow.set_tracking_uri(args.uri)
    try:
        made = log(args.bundle, args.name)
    except ErasecError as error:
        raise SystemExit(str(error)) from error
    print(f"{made.name} version {made.version}")
