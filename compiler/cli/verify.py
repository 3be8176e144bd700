"""The command ``erasec verify``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from erasec.cli import completion, output
from erasec.cli.options import JSON, PICKLE, REVISION, VARIANT, VERBOSE, report_errors
from erasec.progress import note as say


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="output folder of a build")],
    base: Annotated[
        str,
        typer.Option(
            "--base", "-b", metavar="MODEL", help="the model that was edited", autocompletion=completion.models
        ),
    ] = "",
    key: Annotated[
        Path | None, typer.Option("--key", "-k", metavar="PUB.pem", help="public key of who signed the bundle")
    ] = None,
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Verify a bundle of somebody else: signature, digests, report, base, and the weights of each artifact."""
    with report_errors(verbose, bundle):
        from erasec.commands.verify import raise_for_fault
        from erasec.commands.verify import verify as verify_bundle

        verification = verify_bundle(bundle, base, key, revision, variant, allow_pickle)
        if as_json:
            content = {"bundle": str(bundle), "outcome": verification.outcome, "wrong": verification.wrong}
            print(json.dumps(content | asdict(verification), indent=2))
        else:
            rows = [[item.state, item.what, item.how] for item in verification.findings]
            output.table(["state", "what", "how"], rows)
            print(verification.outcome)
        for note in verification.notes:
            say(note)
        raise_for_fault(verification, bundle)
