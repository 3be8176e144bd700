"""Pushes a finished bundle to an OCI registry, and pulls it again: one layer for each file.

    pip install erasec oras
    python examples/oci_release.py push sd14-without-nudity registry.example.org/models/sd14:1
    python examples/oci_release.py pull registry.example.org/models/sd14:1 sd14-without-nudity

Both verify the bundle. A layer that the registry holds already is not sent again, so that a bundle with another edit
costs what the edit changed. The config of the artifact is report.json: a registry shows it without a pull.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

from oras.client import OrasClient

from erasec.checkpoint import manifest
from erasec.commands.verify import raise_for_fault, verify
from erasec.errors import ErasecError

TITLE = "org.opencontainers.image.title"
FILE, REPORT = "application/octet-stream", "application/vnd.erasec.report.v1+json"


def push(bundle: Path, target: str, insecure: bool = False) -> str:
    """Verify and push a bundle. Returns the digest of the artifact, by which it can be pulled: NAME@DIGEST."""
    raise_for_fault(verify(bundle), bundle)
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    if undoing := [item["path"] for item in report["undoing"] if item["inside"]]:
        raise ErasecError(f"{undoing[0]} can undo the erasure", where=str(bundle), fix="build it with --publish")
    names = [*manifest.contents(bundle), manifest.FILE]
    names += [manifest.SIGNATURE] if (bundle / manifest.SIGNATURE).is_file() else []
    annotations = {name: {TITLE: name} for name in names}
    annotations["$manifest"] = {
        TITLE: bundle.resolve().name,
        "org.opencontainers.image.base.name": report["model"]["title"],
        "org.opencontainers.image.base.digest": f"sha256:{report['model']['digest']}",
        "erasec.outcome": report["outcome"],
        "erasec.verdict": report["verdict"],
        "erasec.manifest": f"sha256:{manifest.read(bundle)[1]}",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, contextlib.chdir(bundle):
        json.dump(annotations, file)
        file.flush()
        answer = OrasClient(insecure=insecure).push(
            target=target,
            files=[f"{name}:{FILE}" for name in names],
            annotation_file=file.name,
            manifest_config=f"report.json:{REPORT}",
            quiet=True,
        )
    return str(answer.headers["Docker-Content-Digest"])


def pull(target: str, folder: Path, insecure: bool = False) -> None:
    """Pull a bundle into a new folder and verify it."""
    OrasClient(insecure=insecure).pull(target=target, outdir=str(folder))
    raise_for_fault(verify(folder), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Push and pull bundles of erasec as OCI artifacts.")
    parser.add_argument("action", choices=["push", "pull"])
    parser.add_argument("source", help="bundle, or artifact to pull")
    parser.add_argument("target", help="artifact, or new folder")
    parser.add_argument("--insecure", action="store_true", help="http instead of https")
    args = parser.parse_args()
    try:
        if args.action == "push":
            print(push(Path(args.source), args.target, args.insecure))
        else:
            pull(args.source, Path(args.target), args.insecure)
            print(args.target)
    except ErasecError as error:
        raise SystemExit(str(error)) from error
