"""The command ``erasec push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from erasec.cli.options import JSON, VERBOSE, report_errors
from erasec.errors import printable, words
from erasec.progress import note as say


def push(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="output folder of a build")],
    destination: Annotated[str, typer.Argument(metavar="hub:ORG/NAME", help="repository of the hub")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="who sees a new repository  [default: private]", show_default=False),
    ] = None,
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="by default main; made if new")] = "",
    artifact: Annotated[
        str, typer.Option("--artifact", metavar="NAME", help="put one folder of the bundle, such as hf, at the root")
    ] = "",
    gate: Annotated[bool, typer.Option("--gate", help="push only a build that passed: refuse one not judged")] = False,
    with_undoing: Annotated[
        bool,
        typer.Option("--with-undoing", help="push also what can undo the erasure; the repository becomes gated first"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="verify, and say what would be sent")] = False,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Verify a bundle and send it to the hub as one commit. What the hub holds already is not sent again."""
    with report_errors(verbose, bundle):
        from erasec.checkpoint.disk import size
        from erasec.commands.push import prepare
        from erasec.commands.push import push as push_upload

        upload = prepare(bundle, destination, artifact, with_undoing, gate)
        pushed = None if dry_run else push_upload(upload, revision, private)
        if as_json:
            content = {
                "bundle": str(bundle),
                "repository": upload.repository,
                "revision": revision or "main",
                "dry_run": dry_run,
                "pushed": bool(pushed and pushed.new),
                "url": pushed.url if pushed else "",
                "commit": pushed.commit if pushed else "",
                "private": pushed.private if pushed else None,
                "gated": pushed.gated if pushed else None,
                "removed": list(pushed.removed) if pushed else [],
                "outcome": upload.outcome,
                "unjudged": list(upload.unjudged),
                "undoing": list(upload.undoing),
                "manifest": upload.digest,
                "bytes": upload.bytes,
                "files": {path: record.sha256 for path, (_, record) in upload.files.items()},
            }
            print(json.dumps(content, indent=2))
            return
        what = f"{len(upload.files)} files, {size(upload.bytes)}, manifest {upload.digest}"
        if pushed is None:
            print(f"would push {what} to {upload.repository}")
        else:
            print(pushed.url)
            print(f"pushed {what}" if pushed.new else f"nothing to push: {upload.repository} holds exactly this bundle")
            if pushed.removed:
                print(printable(f"removed files of an earlier push: {words(pushed.removed)}"))
        if upload.outcome == "not judged":
            print(printable(f"not judged: no judge could see {words(upload.unjudged)}; the card says so"))
        for path in upload.undoing:
            say(f"{printable(path)} can undo the erasure, and is in the repository")
