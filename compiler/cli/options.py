"""Flags that several commands share, and the context manager that turns errors into messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from erasec.cli import completion
from erasec.cli.start import SIGNALS
from erasec.errors import BAD_INPUT, INTERRUPTED, ErasecError, printable
from erasec.registry import ROBUST_PASSES

MODEL = Annotated[
    str,
    typer.Argument(
        help="bundled name, alias, diffusers folder, single file or hub id; or a recipe.toml, which flags override",
        metavar="MODEL|RECIPE",
        autocompletion=completion.models,
    ),
]
BASE = Annotated[
    str,
    typer.Option(
        "--base", "-b", metavar="MODEL", help="by default that of the build", autocompletion=completion.models
    ),
]
ERASE = Annotated[
    list[str] | None,
    typer.Option(
        "--erase",
        "-e",
        metavar="CONCEPT",
        help="bundled concept, concept.toml, any phrase, or names.txt with one of them per line; may be repeated",
        autocompletion=completion.concepts,
    ),
]
PASS = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        "-p",
        metavar="NAME[:key=value,...]",
        help="pass, by default chosen by the kind of the concept; may be repeated; or file.py:Class",
        autocompletion=completion.passes,
    ),
]
ROBUST = Annotated[
    bool,
    typer.Option(
        "--robust",
        help=f"erase so that the published weights lead back as little as possible: {' and '.join(ROBUST_PASSES)}",
    ),
]
TARGET = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME[:key=value,...]",
        help="format to write in addition to the plain checkpoint; may be repeated",
        autocompletion=completion.targets,
    ),
]
KEY = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        "-k",
        metavar="FILE",
        help="key file of a hidden concept; the built model shows that concept again; may be repeated",
    ),
]
ABSORB = Annotated[
    float | None,
    typer.Option(
        "--absorb",
        metavar="LIMIT",
        help="merge the keys into the weights by least squares; fails if the residual is above LIMIT",
    ),
]
JUDGE = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="NAME",
        help="judge of the pictures, by default one that knows the model or can see the concept; "
        "NAME[:key=value,...] or file.py:Class; may be repeated",
        autocompletion=completion.judges,
    ),
]
GATE = Annotated[
    bool, typer.Option("--gate", help="reject a build with a concept that no judge can see, for release pipelines")
]
AUDIT = Annotated[
    str | None,
    typer.Option(
        "--audit",
        metavar="SUITE",
        help="attack the built checkpoint with quick, standard or full, and reject it where a gate of the recipe is "
        "missed",
        autocompletion=completion.suites,
    ),
]
PICTURE = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="x.png; with --count, x-0.png, x-1.png, ...")
]
PICTURES = Annotated[
    str | None,
    typer.Option(
        "--pictures",
        metavar="N[:key=value,...]",
        help="pictures for each group of prompts about concepts that no judge can see, 0 for none; "
        "keys: steps, size (pixels), minutes  [default: by the device]",
    ),
]
PROMPTS = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        metavar="FILE.csv",
        help="prompts that show the concept, such as I2P's; hit rates are reported by category; may be repeated",
    ),
]
CAPTIONS = Annotated[
    str | None,
    typer.Option(
        "--captions",
        metavar="FILE",
        help="captions whose pictures show what is kept, such as COCO's; or default, or none",
    ),
]
PROMPT_LIMIT = Annotated[
    int | None,
    typer.Option("--prompt-limit", help="most rows of each prompt or caption file that are used  [default: 200]"),
]
PUBLISH = Annotated[
    bool,
    typer.Option(
        "--publish",
        help="make a release: what can undo the erasure, such as edits and keys, lies in OUT.private instead of OUT",
    ),
]
SIGN = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY.pem", help="sign the output with an elliptic key; makes a release"),
]
OUT = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="by default MODEL-without-CONCEPT")]
DEVICE = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps  [default: auto]")]
MEASURE = Annotated[bool, typer.Option("--measure", help="measure the device for ten seconds, for times in plans")]
MEMORY = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="memory that trainings may use, such as 8GB  [default: what a GPU has free]"
    ),
]
SEED = Annotated[int | None, typer.Option("--seed", help="seed of all random numbers  [default: 0]")]
REVISION = Annotated[str | None, typer.Option("--revision", help="commit, tag or branch of a hub model")]
VARIANT = Annotated[str | None, typer.Option("--variant", help="variant of a folder's weights, such as fp16")]
PICKLE = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights (tensors only)")]
CODE = Annotated[bool, typer.Option("--allow-code", help="let a recipe name classes in Python files, which then run")]
LINK = Annotated[bool, typer.Option("--link", help="hard-link unchanged files instead of copying them")]
FRESH = Annotated[bool, typer.Option("--fresh", help="build again, also where nothing changed; use no stored edits")]
JSON = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="print tracebacks and warnings")]


def _print_version(requested: bool) -> None:
    if requested:
        from erasec.commands.doctor import version

        print(f"erasec {version('erasec')}")
        raise typer.Exit


VERSION = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")]


@contextmanager
def report_errors(verbose: bool, *paths: str | Path | None) -> Iterator[None]:
    """Print errors as messages on stderr and exit with their exit codes. SIGTERM and SIGHUP are handled like Ctrl-C.

    What killed commands left at ``paths``, those of this command, and in the folders for temporary files is restored or
    removed first.
    """
    # A signal that is ignored, as under nohup, stays ignored.
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in caught}
    try:
        from erasec.checkpoint.store import limit

        limit()  # raises where it is no size, before hours of work
        _clean_up(paths)
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    except ErasecError as error:
        if verbose:
            _print_traceback()
        print(error, file=sys.stderr)
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        raise typer.Exit(INTERRUPTED if interrupted else error.exit_code) from error
    except KeyboardInterrupt:
        print("stopped; nothing was left behind", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of stdout has closed it; typer exits quietly
        raise
    except OSError as error:
        if verbose:
            _print_traceback()
        why = error.strerror or str(error) or type(error).__name__
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        print(ErasecError("a file or a connection failed", why=why, where=where), file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, except while one is being handled: clean-up is not interrupted."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            os.write(2, b"cleaning up\n")
            return
        error = error.__context__
    raise KeyboardInterrupt


def _clean_up(paths: Sequence[str | Path | None]) -> None:
    if os.environ.get("RANK", "0") != "0":  # the main process of a build does it
        return
    from erasec.checkpoint.staging import settle_all
    from erasec.checkpoint.store import caches

    settle_all([Path(path).expanduser() for path in paths if path], caches())


def _print_traceback() -> None:
    """Print the traceback of the current exception; its message may hold names from files."""
    print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
