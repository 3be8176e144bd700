"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erasec.cli import output as show
from erasec.cli.options import (
    ABSORB,
    DEVICE,
    ERASE,
    JSON,
    KEY,
    LINK,
    MODEL,
    OUT,
    PASS,
    PICKLE,
    REVISION,
    SEED,
    TARGET,
    VARIANT,
    VERBOSE,
    told,
)
from erasec.errors import TOOL_MISSING, CheckFailed, ErasecError, nearest

if TYPE_CHECKING:
    from erasec.recipe.recipe import Recipe

# What the libraries print while they load; set before they are imported, and only where the user has not.
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

app = typer.Typer(
    name="erasec", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Erase a concept from a text-to-image checkpoint: compute the edit, merge it, export, check, report.",
)  # fmt: skip


def main() -> None:
    """The entry point of the ``erasec`` program."""
    app(prog_name="erasec")


def _version(wanted: bool) -> None:
    if wanted:
        from erasec.commands import doctor

        print(f"erasec {doctor.version('erasec')}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@app.command()
def build(
    model: MODEL, erase: ERASE = None, passes: PASS = None, target: TARGET = None, out: OUT = None,
    key: KEY = None, absorb: ABSORB = None,
    device: DEVICE = None, seed: SEED = None, revision: REVISION = None, variant: VARIANT = None,
    allow_pickle: PICKLE = False, link: LINK = False,
    as_json: JSON = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Erase concepts, write the checkpoint and every target, check them, and report."""
    with told(verbose):
        recipe = _recipe(model, erase, passes, target, device, seed, revision, variant, allow_pickle, link, key, absorb)
        from erasec.commands import build as builds
        from erasec.commands import plan as plans

        main = builds.is_main()  # before the plan, as it gives each process its device
        plan = plans.make(recipe, out)
        if not main:
            builds.assist(plan)
            return
        for note in plans.notes(plan):
            print(f" note: {note}", file=sys.stderr)
        try:
            report = builds.run(plan)
        except CheckFailed as error:
            rejected = Path(error.where) / "report.json"
            if as_json and rejected.is_file():
                print(rejected.read_text(encoding="utf-8"))
            raise
        if as_json:
            print((plan.out / "report.json").read_text(encoding="utf-8"))
            return
        print(f"{plan.out}\n{plan.out / 'report.html'}")
        print(show.verdict(sum(check.limit is not None for check in report.checks), report.rates))
        for sentence in report.notes:
            print(f" note: {sentence}", file=sys.stderr)


@app.command()
def plan(
    model: MODEL, erase: ERASE = None, passes: PASS = None, target: TARGET = None, out: OUT = None,
    key: KEY = None, absorb: ABSORB = None,
    device: DEVICE = None, seed: SEED = None, revision: REVISION = None, variant: VARIANT = None,
    allow_pickle: PICKLE = False, link: LINK = False,
    as_json: JSON = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Say what a build would do: sites, memory, disk, tools. Writes nothing."""
    with told(verbose):
        recipe = _recipe(model, erase, passes, target, device, seed, revision, variant, allow_pickle, link, key, absorb)
        from erasec.commands import plan as plans

        described = plans.describe(plans.make(recipe, out, pin=False))
        if as_json:
            print(json.dumps(described, indent=2))
        else:
            show.print_plan(described)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what a build wrote, or the folder of one target")],
    prompt: Annotated[str, typer.Option("--prompt", help="what to paint; may be empty")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="x.png; x-0.png and on for several")],
    negative: Annotated[str | None, typer.Option("--negative", help="by default the bundle's own")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 25,
    cfg: Annotated[float, typer.Option("--cfg", help="guidance; none at 1")] = 7.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the first image; the others count on")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="how many images")] = 1,
    height: Annotated[int | None, typer.Option("--height", help="pixels, by default the model's")] = None,
    width: Annotated[int | None, typer.Option("--width", help="pixels, by default the model's")] = None,
    backend: Annotated[str, typer.Option("--backend", help="auto, ort, openvino, trt-rtx, trt, torch")] = "auto",
    scheduler: Annotated[str, typer.Option("--scheduler", help="auto, ddim, dpm, euler, pndm")] = "auto",
    verbose: VERBOSE = False,
) -> None:
    """Make images from what was built, with what it was built for; without torch for ONNX and OpenVINO."""
    with told(verbose):
        from erasec.runtime import bundle as runner

        paths = runner.files(out, count)
        seeds = range(seed, seed + count)
        with closing(runner.open_bundle(bundle, backend)) as opened:
            images = opened.generate([prompt] * count, seeds, steps, cfg, negative, height, width, scheduler)
        runner.save(images, paths)
        for path in paths:
            print(path)


@app.command()
def apply(
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="an edit file, from --target edit or erasec combine")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="what it is to change; see erasec build")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="folder, or file for a file")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="change the model's own files, with a journal")] = False,
    transfer: Annotated[bool, typer.Option("--transfer", help="onto a fine-tune of the edit's base")] = False,
    revision: REVISION = None, variant: VARIANT = None,
    allow_pickle: PICKLE = False, link: LINK = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Merge an edit file into a model: seconds, no text encoder, nothing else read."""
    with told(verbose):
        from erasec.commands import apply as applies
        from erasec.commands.plan import size

        done = applies.apply(edit, model, out, in_place, link, transfer, revision, variant or "", allow_pickle)
        print(done.path)
        print(f"changed {done.tensors} tensors, {size(done.bytes)}")
        for sentence in done.notes:
            print(f" note: {sentence}", file=sys.stderr)


@app.command()
def relink(
    folder: Annotated[Path, typer.Argument(metavar="ONNX", help="an ONNX folder of erasec, or the build it lies in")],
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="an edit file of the same base and tensors")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="a copy; else in the folder")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="the base, for an edit file without tensors")] = "",
    revision: REVISION = None, variant: VARIANT = None,
    allow_pickle: PICKLE = False, link: LINK = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Put another edit into an ONNX folder: only the edited tensors are written, nothing is traced."""
    with told(verbose):
        if (folder / "onnx").is_dir():
            folder /= "onnx"
        if model:
            from erasec.commands import apply as applies

            done = applies.relink(folder, edit, out, model, link, revision, variant or "", allow_pickle)
        else:
            from erasec.commands import relink as relinks  # without torch, which takes longer to load than all of this

            done = relinks.relink(folder, edit, out, hard=link)
        print(done.path)
        print(f"changed {done.tensors} tensors, {done.bytes / 1e6:.1f} MB")
        if out is None and (folder.resolve().parent / "report.json").is_file():
            print(" note: the report and the other folders of this build still tell of the old edit", file=sys.stderr)


@app.command()
def combine(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT...", help="edit files of one closed-form pass")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the edit file to write")],
    without: Annotated[list[str] | None, typer.Option("--without", help="a concept to take out again")] = None,
    verbose: VERBOSE = False,
) -> None:
    """Solve the concepts of several edit files as one edit, from their stored sums; needs no model."""
    with told(verbose):
        from erasec.commands import apply as applies

        made = applies.combine(edits, without or (), out)
        print(out)
        print(f"erases {made.concept}")


@app.command()
def prior(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="whose text encoders read the captions")],
    captions: Annotated[Path, typer.Argument(metavar="CAPTIONS", help="one a line; or .csv with prompt or caption")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="such as coco.prior.safetensors")],
    revision: REVISION = None, variant: VARIANT = None,
    allow_pickle: PICKLE = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Build a prior, the Gram of a caption file, for the option prior of closed-form passes."""
    with told(verbose):
        from erasec.closed_form import priors
        from erasec.model import view as models

        count = priors.write(out, models.load(model, revision, variant or "", allow_pickle), captions)
        print(out)
        print(f"{count} captions")


@app.command()
def recover(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a folder or file that --in-place was changing")],
    verbose: VERBOSE = False,
) -> None:
    """Finish what an interrupted --in-place had begun, so that the model is whole again."""
    with told(verbose):
        from erasec.checkpoint import journal

        done = journal.recover(path)
        for file in done:
            print(file)
        print(f"{len(done)} files made whole" if done else "nothing was left unfinished")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a folder, a build, a .safetensors file or a bundled model")],
    b: Annotated[str, typer.Argument(metavar="B", help="the same kind as A")],
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Say which tensors moved from A to B, by how much, and the rank of the difference."""
    with told(verbose):
        from erasec.commands import diff as diffs

        found = diffs.compare(diffs.locate(a), diffs.locate(b))
        if as_json:
            print(json.dumps([dataclasses.asdict(item) for item in found], indent=2))
            return
        moved = [item for item in found if item.kind != "file"]
        if moved:
            show.table(
                ["tensor", "what", "change", "largest", "rank", "note"],
                [[item.key, item.kind, show.number(item.change), show.number(item.largest),
                  "-" if item.rank is None else str(item.rank), item.note] for item in moved],
            )  # fmt: skip
        if files := [item for item in found if item.kind == "file"]:
            show.table(["file", "note"], [[item.key, item.note] for item in files])
        print(f"{len(moved)} tensors differ" if moved else "no tensor moved")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what a build wrote, or the folder of one target")],
    against: Annotated[Path | None, typer.Option("--against", metavar="DIR",
        help="the checkpoint that it is to be; by default the one in the build")] = None,
    as_json: JSON = False, verbose: VERBOSE = False,
) -> None:  # fmt: skip
    """Say whether what was deployed is what was built, runs here, and is its checkpoint; needs no base."""
    with told(verbose):
        from erasec.commands import check as checks

        found = checks.examine(folder, against)
        if as_json:
            print(json.dumps([checks.plain(each) for each in found.checks], indent=2))
        else:
            show.checks(found.checks)
        checks.judge(found, folder)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="passes|targets|concepts|models")], verbose: VERBOSE = False
) -> None:
    """List the passes, targets, concepts or models that can be named."""
    with told(verbose):
        lists = {"passes": show.passes, "targets": show.targets, "concepts": show.concepts, "models": show.models}
        if what not in lists:
            raise ErasecError(f"there is no list of {what!r}", why=nearest(what, lists))
        lists[what]()


@app.command()
def doctor(verbose: VERBOSE = False) -> None:
    """Say what this machine can do, and the pip line for what it cannot."""
    with told(verbose):
        from erasec.commands import doctor as doctors

        found = doctors.examine(Path.cwd())
        rows = [[item.name, "ok" if item.there else "missing", item.found, item.fix] for item in found]
        show.table(["what", "state", "found", "fix"], rows)
        if any(item.required and not item.there for item in found):
            raise typer.Exit(TOOL_MISSING)


def _recipe(
    model: str, erase: list[str] | None, passes: list[str] | None, targets: list[str] | None, device: str | None,
    seed: int | None, revision: str | None, variant: str | None, allow_pickle: bool, link: bool,
    keys: list[str] | None, absorb: float | None,
) -> Recipe:  # fmt: skip
    from erasec.recipe import recipe

    # A flag that is not given does not replace the key of a recipe.
    return recipe.from_flags(
        model,
        erase or (),
        passes or (),
        targets or (),
        device,
        seed,
        revision,
        variant,
        allow_pickle or None,
        link or None,
        keys or (),
        absorb,
    )
