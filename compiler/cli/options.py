"""What the commands of the command line have in common: their options, and how errors become words and exit codes."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from erasec.errors import BAD_INPUT, ErasecError

STOPPED = 130

MODEL = Annotated[str, typer.Argument(
    help="bundled name, alias, diffusers folder, single file or hub id; or a recipe.toml, whose keys the flags replace",
    metavar="MODEL|RECIPE")]  # fmt: skip
ERASE = Annotated[list[str] | None, typer.Option("--erase", "-e", metavar="CONCEPT",
    help="bundled concept, concept.toml, or any phrase; may be repeated")]  # fmt: skip
PASS = Annotated[list[str] | None, typer.Option("--pass", "-p", metavar="NAME[:key=value,...]",
    help="how to erase, by default chosen by the concept's kind; may be repeated; or file.py:Class")]  # fmt: skip
TARGET = Annotated[list[str] | None, typer.Option("--target", "-t", metavar="NAME[:key=value,...]",
    help="format to write beside the plain checkpoint; may be repeated")]  # fmt: skip
KEY = Annotated[list[str] | None, typer.Option("--key", "-k", metavar="FILE",
    help="key file of a hidden concept, which comes back in what is built; may be repeated")]  # fmt: skip
ABSORB = Annotated[float | None, typer.Option("--absorb", metavar="LIMIT",
    help="put the keys into stock weights by least squares; fails where the residual is above LIMIT")]  # fmt: skip
OUT = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="by default MODEL-without-CONCEPT")]
DEVICE = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps  [default: auto]")]
SEED = Annotated[int | None, typer.Option("--seed", help="seed of everything that draws numbers  [default: 0]")]
REVISION = Annotated[str | None, typer.Option("--revision", help="commit, tag or branch of a hub model")]
VARIANT = Annotated[str | None, typer.Option("--variant", help="which precision of a folder's weights, such as fp16")]
PICKLE = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights, as tensors alone")]
LINK = Annotated[bool, typer.Option("--link", help="hard links in place of copies of unchanged files")]
JSON = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
VERBOSE = Annotated[bool, typer.Option("--verbose", "-v", help="print the traceback of an error, and warnings")]


@contextmanager
def told(verbose: bool) -> Iterator[None]:
    """Turn errors into words and exit codes; a termination signal is taken as Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    except ErasecError as error:
        if verbose:
            traceback.print_exc()
        print(error, file=sys.stderr)
        stopped = isinstance(error.__cause__, KeyboardInterrupt)
        raise typer.Exit(STOPPED if stopped else error.exit_code) from error
    except KeyboardInterrupt:
        print("stopped; nothing was left behind", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except BrokenPipeError:  # the reader of stdout has seen enough; typer ends quietly
        raise
    except OSError as error:
        if verbose:
            traceback.print_exc()
        why = error.strerror or str(error) or type(error).__name__
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        print(ErasecError("a file or a connection failed", why=why, where=where), file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from error
    finally:
        signal.signal(signal.SIGTERM, previous)
