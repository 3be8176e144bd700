"""The command ``erasec explain``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from erasec.cli.options import BASE, JSON, VERBOSE, report_errors
from erasec.cli.output import table
from erasec.errors import printable

if TYPE_CHECKING:
    from erasec.commands.explain import Explanation


def explain(
    name: Annotated[str, typer.Argument(metavar="EDIT|BUILD|MODEL", help="an edit file, a build, or an edited model")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="by default each phrase that is erased or kept; may be repeated"),
    ] = None,
    base: BASE = "",
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="PHRASE", help="further phrases to compare with; may be repeated"),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="phrases that are listed for each prompt")] = 3,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Say how far an edit moves the text of a prompt, and to which phrases it comes near. Paints no picture."""
    with report_errors(verbose):
        from erasec.commands.explain import explain as explain_prompts

        explained = explain_prompts(name, prompt or (), base, against or (), count)
        if as_json:
            print(json.dumps([asdict(each) for each in explained], indent=2))
        elif prompt:
            for each in explained:
                _print(each)
        else:
            rows = [[printable(each.prompt), f"{each.moved:.0%}", _listed(each.after)] for each in explained]
            table(["phrase", "moved", "nearest after the edit"], rows)


def _print(each: Explanation) -> None:
    print(f"{printable(each.prompt)!r} moves by {each.moved:.0%}")
    print(f"  tokens  {', '.join(f'{printable(token)} {share:.0%}' for token, share in each.tokens)}")
    print(f"  before  {_listed(each.before)}")
    print(f"  after   {_listed(each.after)}")


def _listed(pairs: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{printable(phrase)} {distance:.2f}" for phrase, distance in pairs)
