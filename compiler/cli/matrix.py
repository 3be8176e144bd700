"""The command ``erasec matrix``: many models, concepts and recipes in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erasec.cli import output
from erasec.cli.options import CODE, JSON, VERBOSE, report_errors


def matrix(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML with models and concepts: docs/matrix.md")],
    out: Annotated[Path, typer.Option("--out", help="folder of all builds")] = Path("builds"),
    plan: Annotated[bool, typer.Option("--plan", help="only say what would be built, and how long it takes")] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=0, help="builds at a time on this machine; 0 is as many as fit")
    ] = 0,
    ray: Annotated[str, typer.Option("--ray", metavar="ADDRESS", help="run on this Ray cluster")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="build also what is there")] = False,
    allow_code: CODE = False,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Build every model with every concept and every variant of a recipe, and write one page about all of them."""
    with report_errors(verbose):
        from erasec.commands.matrix import at_once, make_groups, run
        from erasec.commands.matrix_file import from_file
        from erasec.commands.workers import Local, Ray
        from erasec.tensorrt.devices import visible

        groups = make_groups(from_file(file, allow_code), out)
        on_gpus = any(group.device.startswith("cuda") for group in groups)
        gpus = tuple(visible()) if on_gpus else ()
        count = jobs or at_once(groups, len(gpus))
        output.print_groups(groups, count, as_json and plan)
        if plan:
            return
        workers = Ray(ray) if ray else Local(count, gpus)
        try:
            run(groups, out, workers, fresh)
        finally:
            page = out / "matrix.json"
            if as_json and page.is_file():
                print(page.read_text(encoding="utf-8"))
            elif page.is_file():
                print(out / "matrix.html")
