"""The command ``erasec audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasec.cli import completion
from erasec.cli.options import BASE, DEVICE, JSON, JUDGE, PICKLE, REVISION, SEED, VARIANT, VERBOSE, report_errors
from erasec.errors import printable
from erasec.progress import note as say


def audit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|BUILD",
            help="a build, one of its folders, or any model; see erasec build",
            autocompletion=completion.models,
        ),
    ],
    base: BASE = "",
    twin: Annotated[
        str,
        typer.Option(
            "--twin",
            metavar="MODEL",
            help="a model that never saw the concept",
            autocompletion=completion.models,
        ),
    ] = "",
    concept: Annotated[
        str,
        typer.Option(
            "--concept",
            "-c",
            help="by default the one that the build erased",
            autocompletion=completion.concepts,
        ),
    ] = "",
    suite: Annotated[
        str, typer.Option("--suite", "-s", help="quick, standard or full", autocompletion=completion.suites)
    ] = "quick",
    probe: Annotated[
        list[str] | None,
        typer.Option(
            "--probe",
            metavar="NAME[:key=value,...]",
            help="instead of a suite; may be repeated",
            autocompletion=completion.probes,
        ),
    ] = None,
    judge: JUDGE = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="PROBE=SHARE", help="a gate, instead of those of the recipe; may be repeated"),
    ] = None,
    budget: Annotated[float, typer.Option("--budget", min=0, help="minutes after which no probe is begun")] = 0.0,
    images: Annotated[int, typer.Option("--images", min=0, help="pictures per rate; 0 is that of the suite")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=0, help="steps of sampling; 0 is those of the build")] = 0,
    size: Annotated[
        int, typer.Option("--size", min=0, help="longest side of pictures in pixels; 0 is the size of the model")
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="by default NAME.audit")] = None,
    device: DEVICE = None,
    seed: SEED = None,
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Attack a finished model: is its concept erased, or only hidden? Writes audit.html and audit.json."""
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model.replace("/", "-")
    target = out or Path(f"{name}.audit")
    with report_errors(verbose, target):
        from erasec.commands.audit import Request, parse_limits
        from erasec.commands.audit import audit as run_audit
        from erasec.errors import CheckFailed

        request = Request(
            model=model,
            base=base,
            twin=twin,
            concept=concept,
            suite=suite,
            probes=tuple(probe or ()),
            judges=tuple(judge or ()),
            limits=parse_limits(limit) if limit else None,
            minutes=budget,
            images=images,
            steps=steps,
            size=size,
            device=device or "auto",
            seed=seed,
            revision=revision,
            variant=variant or "",
            allow_pickle=allow_pickle,
        )
        try:
            report = run_audit(request, target)
        except CheckFailed:
            if as_json:
                print((target / "audit.json").read_text(encoding="utf-8"))
            raise
        if as_json:
            print((target / "audit.json").read_text(encoding="utf-8"))
            return
        print(target / "audit.html")
        print(printable(report.headline))
        print(printable(f"how: {report.notion}"))
        for note in report.notes:
            say(note)
