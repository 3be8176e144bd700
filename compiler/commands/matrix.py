"""``erasec matrix``: plans and runs many builds, and writes one page about all of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erasec import registry
from erasec.checkpoint.disk import FOLDER
from erasec.checkpoint.inputs import code_digest, file_digests, requirements, versions
from erasec.checkpoint.safetensors import atomic_write, file_digest
from erasec.commands import durations, estimates
from erasec.commands.current import recipe_files
from erasec.commands.matrix_file import Job
from erasec.commands.plan import Plan, make_plan
from erasec.commands.release import rejected_folder
from erasec.commands.workers import End, Task, Workers
from erasec.documents import read_json
from erasec.errors import CheckFailed, ErasecError
from erasec.model.available import available_memory
from erasec.model.threads import chosen_threads
from erasec.progress import note
from erasec.recipe.recipe import to_toml
from erasec.reporting.matrix_page import Row, write_page
from erasec.reporting.read import REPORT, outcome, read_report

WORK = ".matrix"  # recipes and records of builds, in the folder of a matrix


@dataclass(frozen=True)
class Group:
    """The builds of one model and variant, of which one was planned: ``memory`` in bytes and ``seconds`` as the least
    and the most of one build, ``device``; ``why`` says what stands against them, "" if nothing."""

    model: str
    variant: str
    jobs: tuple[Job, ...]
    memory: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    device: str = "cpu"
    why: str = ""


def make_groups(jobs: Sequence[Job], out: Path) -> list[Group]:
    """The builds by model and variant. The first of each is planned as ``erasec plan`` does it, without writing."""
    members: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        members.setdefault((job.model, job.variant), []).append(job)
    groups = []
    for (model, variant), own in members.items():
        first = own[0]
        try:
            plan: Plan = make_plan(first.recipe, out / first.name, pin=False)
        except ErasecError as error:
            groups.append(
                Group(model, variant, tuple(own), why=f"{error.what}: {error.why}" if error.why else error.what)
            )
            continue
        least, most = durations.estimate(plan)["range"]
        peak = estimates.memory(plan)["bytes"]
        groups.append(Group(model, variant, tuple(own), peak, (least, most), plan.context.device))
    return groups


def at_once(groups: Sequence[Group], gpus: int) -> int:
    """How many builds this machine runs at a time: one on each GPU; else as many as its memory and its cores hold."""
    if gpus:
        return gpus
    peak = max((group.memory for group in groups), default=0)
    by_memory = (available_memory() or peak) // peak if peak else 1
    return max(1, min(by_memory, (os.cpu_count() or 1) // chosen_threads()))


def run(groups: Sequence[Group], out: Path, workers: Workers, fresh: bool = False, shown: bool = True) -> list[Row]:
    """Build everything that is not built yet, and write ``matrix.html`` and ``matrix.json`` into ``out``.

    A build that ended well is started again, and does nothing where its inputs and its files are the same. A build that
    was rejected before, with the same inputs, is not repeated without ``fresh``. Raises CheckFailed, after the page is
    written, where a build was rejected or failed.
    """
    (out / WORK).mkdir(FOLDER, parents=True, exist_ok=True)
    jobs = {job.name: (job, group) for group in groups for job in group.jobs}
    inputs = {name: _inputs(job) for name, (job, _) in jobs.items()}  # before a build begins: they may change meanwhile
    rows = {name: _rejected(out, job, inputs[name]) if not fresh else None for name, (job, _) in jobs.items()}
    tasks = [_task(out, job, group, fresh) for name, (job, group) in jobs.items() if rows[name] is None]
    try:
        with _live([*jobs], rows, shown) as (started, ended):
            for end in workers.run(tasks, started):
                rows[end.name] = _record(out, jobs[end.name][0], end, inputs[end.name])
                ended(end.name)
    finally:  # what is there is shown, also after an interrupt
        ordered = [rows[name] or _row(job, "not built") for name, (job, _) in jobs.items()]
        write_page(ordered, out)
    if bad := [row for row in ordered if row.state not in ("passed", "not judged")]:
        raise CheckFailed(
            f"{len(bad)} of {len(ordered)} builds are not there",
            why="; ".join(f"{row.name}: {row.state}" for row in bad[:5]) + ("; ..." if len(bad) > 5 else ""),
            where=str(out / "matrix.html"),
            fix="look at the page; the same command builds again what failed, and nothing that ended well",
        )
    return ordered


def _task(out: Path, job: Job, group: Group, fresh: bool) -> Task:
    recipe = out.resolve() / WORK / f"{job.name}.toml"
    recipe.write_text(to_toml(job.recipe), encoding="utf-8")
    return Task(
        job.name,
        job.model,
        recipe,
        out.resolve() / job.name,
        ("--allow-code", *(["--fresh"] if fresh else [])),  # the matrix was checked for code
        chosen_threads(),
        group.memory,
        int(group.device.startswith("cuda")),
        Path.cwd(),
    )


def _row(job: Job, state: str, **facts: Any) -> Row:
    return Row(job.name, job.model, job.concepts, job.variant, state, **facts)


def _record(out: Path, job: Job, end: End, inputs: str) -> Row:
    """The row of a build that has ended, which is kept for a later run."""
    state = {0: "built", 3: "rejected", 130: "stopped"}.get(end.exit, "killed" if end.exit < 0 else "failed")
    folder = rejected_folder(job.recipe, out.resolve() / job.name) if state == "rejected" else out.resolve() / job.name
    why = "" if end.exit == 0 else _last_error(end.error)
    report = ""
    if state in ("built", "rejected") and (folder / REPORT).is_file():
        state, report = outcome(read_report(folder)), file_digest(folder / REPORT)
    run = {"seconds": end.seconds, "attempts": end.attempts, "where": end.where}
    earlier = _earlier(out, job)
    if report and earlier.get("report") == report:  # the build had nothing to do
        run = {name: earlier[name] for name in run}
    row = _row(job, state, why=why, folder=os.path.relpath(folder, out.resolve()), **run)
    with atomic_write(out / WORK / f"{job.name}.json") as temporary:
        temporary.write_text(
            json.dumps({**asdict(row), "inputs": inputs, "report": report}, indent=1), encoding="utf-8"
        )
    return row


def _earlier(out: Path, job: Job) -> dict[str, Any]:
    """What ``_record`` wrote in an earlier run; {} where there is nothing that can be read."""
    try:
        return read_json(out / WORK / f"{job.name}.json", dict[str, Any])
    except ErasecError:
        return {}


def _last_error(text: str) -> str:
    """The last error message in what a build wrote to stderr."""
    lines = text.strip().splitlines()
    at = max((number for number, line in enumerate(lines) if line.startswith("error:")), default=max(0, len(lines) - 3))
    return " ".join(line.strip() for line in lines[at:])


def _rejected(out: Path, job: Job, inputs: str) -> Row | None:
    """The row of a build that was rejected with the same inputs, and would be again; None for any other."""
    facts = _earlier(out, job)
    same = facts.pop("inputs", "") == inputs and facts.get("state") == "rejected"
    report = facts.pop("report", "")
    try:
        row = Row(**{**facts, "concepts": tuple(facts["concepts"])})
    except (KeyError, TypeError):
        return None
    file = out / row.folder / REPORT
    return row if same and file.is_file() and file_digest(file) == report else None


def _inputs(job: Job) -> str:
    """A digest of what a build depends on, as far as it can be compared without planning the build: its recipe, the
    concepts and files that this names, the sizes and times of the files of its model, erasec's code, and versions."""
    model = Path(job.model).expanduser()
    files = sorted(file for file in (model, *model.rglob("*")) if file.is_file()) if model.exists() else []
    facts = [
        to_toml(job.recipe),
        recipe_files(job.recipe),
        file_digests(re.sub(r"(\.toml):.*", r"\1", name) for name in job.recipe.erase if ".toml" in name),
        [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        code_digest(),
        [versions(requirements()), registry.distributions()],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _live(
    names: Sequence[str], rows: dict[str, Row | None], shown: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Show the states of all builds while they run: a table on a terminal, else a line for each that ends."""
    import sys

    running: set[str] = set()
    total = len(names)

    def ended_count() -> int:
        return sum(row is not None for row in rows.values())

    if not (shown and sys.stderr.isatty()):

        def ended(name: str) -> None:
            row = rows[name]
            if row is not None and shown:
                note(f"{ended_count()} of {total}: {name} {row.state} in {row.seconds:.0f} s")

        yield lambda _: None, ended
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        table = Table("build", "state", "time", title=f"{ended_count()} of {total} builds")
        # A terminal has room for the builds that run, and the last ones that ended.
        last = [name for name in names if rows[name] is not None][-15:]
        for name in [*last, *sorted(running)]:
            row = rows[name]
            table.add_row(name, row.state if row else "running", f"{row.seconds:.0f} s" if row else "")
        return table

    with Live(table(), console=Console(stderr=True), refresh_per_second=2) as live:

        def begin(name: str) -> None:
            running.add(name)
            live.update(table())

        def end(name: str) -> None:
            running.discard(name)
            live.update(table())

        yield begin, end
