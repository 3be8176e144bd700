"""The commands of the command line. Results go to stdout; progress, notes and errors go to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from erasec.cli import completion, output
from erasec.cli.audit import audit
from erasec.cli.build import build, plan
from erasec.cli.cache import cache
from erasec.cli.explain import explain
from erasec.cli.matrix import matrix
from erasec.cli.options import (
    DEVICE,
    JSON,
    LINK,
    MEASURE,
    PICKLE,
    PICTURE,
    REVISION,
    VARIANT,
    VERBOSE,
    VERSION,
    report_errors,
)
from erasec.cli.push import push
from erasec.cli.verify import verify
from erasec.errors import TOOL_MISSING, ErasecError, printable, suggestion
from erasec.progress import note as say
from erasec.registry import RUNTIMES

# Keep the libraries quiet while they load. Set before they are imported, and only if the user has not set them.
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

app = typer.Typer(
    name="erasec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Erase a concept from a text-to-image checkpoint: compute the edit, merge it, export, check, report.",
)


def main() -> None:
    """The entry point of the ``erasec`` program."""
    app(prog_name="erasec")


@app.callback()
def _start(version: VERSION = False) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


app.command()(build)
app.command()(plan)
app.command()(cache)
app.command()(matrix)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="output folder of a build, or of one target")],
    prompt: Annotated[str, typer.Option("--prompt", help="the prompt; may be empty")],
    out: PICTURE,
    negative: Annotated[str | None, typer.Option("--negative", help="by default the bundle's")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 25,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="guidance scale, by default the family's; 1 is no guidance")
    ] = None,
    cfg: Annotated[float | None, typer.Option("--cfg", hidden=True)] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the first image; then seed + 1, ...")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="number of images")] = 1,
    height: Annotated[int | None, typer.Option("--height", help="pixels, by default the model's")] = None,
    width: Annotated[int | None, typer.Option("--width", help="pixels, by default the model's")] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend", help=", ".join(("auto", *RUNTIMES, "file.py:Class")), autocompletion=completion.runtimes
        ),
    ] = "auto",
    scheduler: Annotated[str, typer.Option("--scheduler", help="auto, ddim, dpm, euler, pndm")] = "auto",
    verbose: VERBOSE = False,
) -> None:
    """Generate images with a built folder. ONNX and OpenVINO folders need no torch."""
    with report_errors(verbose, bundle, out):
        from erasec.commands.run import cut_notes, picture_paths, save_pictures
        from erasec.runtime.bundle import open_bundle

        if cfg is not None:
            from erasec.options import say_renamed

            say_renamed("--cfg", "--guidance")
            guidance = cfg
        paths = picture_paths(out, count)
        with closing(open_bundle(bundle, backend)) as opened:
            for note in cut_notes(opened, prompt, negative):
                say(note)
            seeds = range(seed, seed + count)
            images = opened.generate([prompt] * count, seeds, steps, guidance, negative, height, width, scheduler)
        save_pictures(images, paths)
        for path in paths:
            print(path)


@app.command()
def apply(
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="edit file, from --target edit or erasec combine")],
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="the model to edit; see erasec build", autocompletion=completion.models),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="output folder, or file")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="change the model's own files, with a journal")] = False,
    transfer: Annotated[bool, typer.Option("--transfer", help="edit a fine-tune of the edit's base model")] = False,
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    link: LINK = False,
    verbose: VERBOSE = False,
) -> None:
    """Merge an edit file into a model. This takes seconds and computes nothing with the model."""
    with report_errors(verbose, edit, model, out):
        from erasec.checkpoint.disk import size
        from erasec.commands.apply import apply as apply_edit

        result = apply_edit(edit, model, out, in_place, link, transfer, revision, variant or "", allow_pickle)
        print(result.path)
        print(f"changed {result.tensors} tensors, {size(result.bytes)}")
        for note in result.notes:
            say(note)


@app.command()
def relink(
    folder: Annotated[Path, typer.Argument(metavar="ONNX", help="ONNX folder of erasec, or the build around it")],
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="edit file with the same base and tensors")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="write a copy, not the folder")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="base, if the edit file has no tensors")] = "",
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    link: LINK = False,
    verbose: VERBOSE = False,
) -> None:
    """Replace the edit in an ONNX folder. Only the edited tensors are written; no graph is traced."""
    with report_errors(verbose, folder, edit, out, model):
        from erasec.checkpoint.disk import size

        if (folder / "onnx").is_dir():
            folder /= "onnx"
        if model:
            from erasec.commands.apply import relink as relink_from_base

            result = relink_from_base(folder, edit, out, model, link, revision, variant or "", allow_pickle)
        else:
            # This module does not import torch, which takes longer to load than the whole command.
            from erasec.commands.relink import relink as relink_folder

            result = relink_folder(folder, edit, out, hard=link)
        print(result.path)
        print(f"changed {result.tensors} tensors, {size(result.bytes)}")
        if out is None and (folder.resolve().parent / "report.json").is_file():
            say("the report and the other folders of this build still describe the old edit")


@app.command()
def combine(
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT...", help="edit files of one closed-form pass")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the edit file to write")],
    without: Annotated[list[str] | None, typer.Option("--without", help="concept to leave out")] = None,
    verbose: VERBOSE = False,
) -> None:
    """Solve the concepts of several edit files as one edit, from the sums stored in them. Needs no model."""
    with report_errors(verbose, *edits, out):
        from erasec.commands.combine import combine as combine_edits

        edit = combine_edits(edits, without or (), out)
        print(out)
        print(f"erases {printable(', '.join(edit.concepts))}")


@app.command()
def prior(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="model whose text encoders encode the captions", autocompletion=completion.models
        ),
    ],
    captions: Annotated[Path, typer.Argument(metavar="CAPTIONS", help="one per line; a .csv file; or everyday")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="such as coco.prior.safetensors")],
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    verbose: VERBOSE = False,
) -> None:
    """Compute a prior, the Gram matrix of a caption file, for the option prior of closed-form passes."""
    with report_errors(verbose, model, captions, out):
        from erasec.closed_form import priors
        from erasec.model import loading
        from erasec.model.cuts import summarise_cuts

        opened = loading.load(model, revision, variant or "", allow_pickle)
        texts = priors.write(out, opened, captions)
        if cuts := summarise_cuts(texts, opened):
            say(f"captions of {captions.name}: {cuts}")
        print(out)
        print(f"{len(texts)} captions")


@app.command()
def recover(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="folder or file that --in-place was changing")],
    verbose: VERBOSE = False,
) -> None:
    """Finish an interrupted --in-place edit, so that the model can be read again."""
    with report_errors(verbose, path):
        from erasec.checkpoint import journal

        files = journal.recover(path)
        for file in files:
            print(printable(str(file)))
        print(f"{len(files)} files recovered" if files else "no interrupted edit")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="folder, build, .safetensors file or bundled model")],
    b: Annotated[str, typer.Argument(metavar="B", help="the same kind as A")],
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """List the tensors that differ between A and B: by how much, and the rank of the difference."""
    with report_errors(verbose, a, b):
        from erasec.commands.diff import compare, locate

        differences = compare(locate(a), locate(b))
        if as_json:
            print(json.dumps([dataclasses.asdict(item) for item in differences], indent=2))
            return
        output.differences(differences)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="a build, or a folder or file in it")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR", help="checkpoint to compare with, by default the one in the build"),
    ] = None,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Check that a built folder is unchanged, runs on this machine, and agrees with its checkpoint."""
    with report_errors(verbose, folder, against):
        from erasec.commands.check import check_as_json, examine, raise_for_failures

        examination = examine(folder, against)
        if as_json:
            print(json.dumps([check_as_json(item) for item in examination.checks], indent=2))
        else:
            output.checks(examination.checks)
        for note in examination.notes:
            say(note)
        raise_for_failures(examination, folder)


app.command()(verify)
app.command()(push)
app.command()(audit)
app.command()(explain)


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="passes|targets|judges|probes|runtimes|concepts|models", autocompletion=lambda: [*output.LISTS]
        ),
    ],
    verbose: VERBOSE = False,
) -> None:
    """List the passes, targets, judges, probes, runtimes, concepts or models, with options and their ranges."""
    with report_errors(verbose):
        if what not in output.LISTS:
            raise ErasecError(f"there is no list of {what!r}", why=suggestion(what, output.LISTS))
        output.LISTS[what]()


@app.command()
def doctor(measure: MEASURE = False, device: DEVICE = None, verbose: VERBOSE = False) -> None:
    """Show what this machine can run, and the pip command for each library that is missing."""
    with report_errors(verbose):
        if measure:
            from erasec.commands.plan import find_device
            from erasec.commands.speed import measured

            print(measured(find_device(device or "auto")))
            return
        from erasec.commands.doctor import examine

        findings = examine(Path.cwd())
        output.findings(findings)
        if any(item.required and not item.available for item in findings):
            raise typer.Exit(TOOL_MISSING)
