"""The commands ``erasec build`` and ``erasec plan``, which take the same options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erasec.cli import output
from erasec.cli.options import (
    ABSORB,
    AUDIT,
    CAPTIONS,
    CODE,
    DEVICE,
    ERASE,
    FRESH,
    GATE,
    JSON,
    JUDGE,
    KEY,
    LINK,
    MEMORY,
    MODEL,
    OUT,
    PASS,
    PICKLE,
    PICTURES,
    PROMPT_LIMIT,
    PROMPTS,
    PUBLISH,
    REVISION,
    ROBUST,
    SEED,
    SIGN,
    TARGET,
    VARIANT,
    VERBOSE,
    report_errors,
)
from erasec.errors import CheckFailed, ErasecError, printable
from erasec.progress import note as say
from erasec.registry import ROBUST_PASSES

if TYPE_CHECKING:
    from erasec.recipe.recipe import Recipe


def build(
    model: MODEL,
    erase: ERASE = None,
    passes: PASS = None,
    robust: ROBUST = False,
    target: TARGET = None,
    out: OUT = None,
    key: KEY = None,
    absorb: ABSORB = None,
    judge: JUDGE = None,
    gate: GATE = False,
    audit: AUDIT = None,
    pictures: PICTURES = None,
    prompts: PROMPTS = None,
    captions: CAPTIONS = None,
    prompt_limit: PROMPT_LIMIT = None,
    device: DEVICE = None,
    memory: MEMORY = None,
    seed: SEED = None,
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    allow_code: CODE = False,
    link: LINK = False,
    fresh: FRESH = False,
    publish: PUBLISH = False,
    sign: SIGN = None,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Erase concepts: write the edited checkpoint and every target, check them, and write a report."""
    with report_errors(verbose, model, out):
        passes = _passes(passes, robust)
        recipe = _recipe(
            model,
            erase=erase,
            passes=passes,
            targets=target,
            keys=key,
            absorb=absorb,
            judge=judge,
            gate=gate or None,
            pictures=pictures,
            prompts=prompts,
            captions=captions,
            prompt_limit=prompt_limit,
            device=device,
            memory=memory,
            seed=seed,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle or None,
            allow_code=allow_code,
            link=link or None,
            audit=audit,
            publish=publish or sign is not None or None,
        )
        from erasec.commands.current import current
        from erasec.commands.plan import make_plan, notes
        from erasec.training.processes import is_main

        main = is_main()  # before the plan, because it assigns a device to each process
        planned = make_plan(recipe, out, by_flag=bool(passes), sign=sign)
        if not main:
            from erasec.commands.build import train_in_worker

            train_in_worker(planned)
            return
        for note in (printed := notes(planned)):
            say(note)
        facts = None if fresh else current(planned)
        if facts is None:
            from erasec.commands.build import run as run_plan
            from erasec.reporting.facts import facts_of

            try:
                facts = facts_of(run_plan(planned, fresh))
            except CheckFailed as error:
                if as_json:
                    output.print_facts(Path(error.where))
                raise
        else:
            say(f"{planned.out} is up to date: this build wrote it, and no file has changed (--fresh builds it again)")
        if as_json:
            output.print_facts(planned.out)
            return
        print(f"{planned.out}\n{planned.out / 'report.html'}")
        print(output.verdict(facts))
        for audited in facts["audits"]:
            print(printable(audited["headline"]))
        for note in facts["notes"]:
            if note not in printed:
                say(note)


def plan(
    model: MODEL,
    erase: ERASE = None,
    passes: PASS = None,
    robust: ROBUST = False,
    target: TARGET = None,
    out: OUT = None,
    key: KEY = None,
    absorb: ABSORB = None,
    judge: JUDGE = None,
    gate: GATE = False,
    audit: AUDIT = None,
    pictures: PICTURES = None,
    prompts: PROMPTS = None,
    captions: CAPTIONS = None,
    prompt_limit: PROMPT_LIMIT = None,
    device: DEVICE = None,
    memory: MEMORY = None,
    seed: SEED = None,
    revision: REVISION = None,
    variant: VARIANT = None,
    allow_pickle: PICKLE = False,
    allow_code: CODE = False,
    link: LINK = False,
    publish: PUBLISH = False,
    sign: SIGN = None,
    all_sites: Annotated[bool, typer.Option("--sites", help="list every site instead of groups of sites")] = False,
    apart: Annotated[
        bool, typer.Option("--apart", help="read the text encoder, and name kept phrases that lie near to erased ones")
    ] = False,
    as_json: JSON = False,
    verbose: VERBOSE = False,
) -> None:
    """Show what a build would do: sites, judge, memory, disk, time and tools. Writes nothing."""
    with report_errors(verbose, model, out):
        passes = _passes(passes, robust)
        recipe = _recipe(
            model,
            erase=erase,
            passes=passes,
            targets=target,
            keys=key,
            absorb=absorb,
            judge=judge,
            gate=gate or None,
            pictures=pictures,
            prompts=prompts,
            captions=captions,
            prompt_limit=prompt_limit,
            device=device,
            memory=memory,
            seed=seed,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle or None,
            allow_code=allow_code,
            link=link or None,
            audit=audit,
            publish=publish or sign is not None or None,
        )
        from erasec.commands.plan import describe, describe_pairs, make_plan

        planned = make_plan(recipe, out, pin=False, by_flag=bool(passes), sign=sign)
        if recipe.audit:
            from erasec.commands.audit import check_auditable

            check_auditable(planned, recipe.audit)
        described = describe(planned)
        if apart:
            described |= describe_pairs(planned)
        if as_json:
            print(json.dumps(described, indent=2))
        else:
            output.print_plan(described, all_sites)


def _passes(passes: list[str] | None, robust: bool) -> list[str] | None:
    """The passes of a command line. Raises ErasecError where ``--robust`` and ``--pass`` are both given."""
    if not robust:
        return passes
    if passes:
        raise ErasecError(
            "--robust and --pass are both given",
            why=f"--robust means --pass {' --pass '.join(ROBUST_PASSES)}",
            fix="leave out one of them; options of a pass belong into --pass NAME:key=value",
        )
    return list(ROBUST_PASSES)


def _recipe(model: str, **flags: Any) -> Recipe:
    """The recipe of a command line. A flag that is not given leaves the value in a recipe file as it is."""
    from erasec.recipe.recipe import from_flags

    return from_flags(model, **{name: value for name, value in flags.items() if value is not None})
