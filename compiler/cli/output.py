"""What the command line prints: verdicts, plans, lists and tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from erasec import registry
from erasec.errors import printable, words

if TYPE_CHECKING:
    from pathlib import Path

    from erasec.base import Check
    from erasec.commands.diff import Difference
    from erasec.commands.doctor import Finding
    from erasec.commands.matrix import Group

# A plan prints so many concepts and notes; --json has all of them.
LISTED = 12


def verdict(facts: Mapping[str, Any]) -> str:
    """One line: the state of the build, how many checks hold, and the hit rate before and after the edit for each group
    of prompts; then a line for each prompt file and label. ``facts`` are those of its report.json."""
    titles = {
        "name": "by name",
        "synonym": "by synonym",
        "implicit": "implicitly",
        "keyed": "with the key",
        "keep": "everything else",
    }
    parts = []
    for group in dict.fromkeys(row["group"] for row in facts["rates"]):
        if mean := facts["summary"].get(group):
            parts.append(f"{titles.get(group, group)} {mean['before']:.0%} -> {mean['after']:.0%}")
    shown = f"; shown {', '.join(parts)}" if parts else ""
    checks = sum(check["limit"] is not None for check in facts["checks"])
    if facts["outcome"] == "passed":
        line = f"passed {'its one check' if checks == 1 else f'all {checks} checks'}{shown}"
    elif facts["outcome"] == "not judged":
        held = f"of what could be checked nothing failed ({checks} checks)"
        line = f"not judged: no judge can see {words(facts['unjudged'])} in these pictures; {held}{shown}"
    else:
        line = f"rejected: {', '.join(facts['failed'])} failed{shown}"
    lines = [line]
    for file in facts["prompt_files"]:
        for row in (row for row in file["rows"] if not row["category"]):
            shares = f"{row['before']:.0%} -> {row['after']:.0%} of {row['images']} pictures"
            lines.append(f"{file['file']}: {row['looked_for']} in {shares}")
    return printable("\n".join(lines), keep="\n")


def print_groups(groups: Sequence[Group], count: int, as_json: bool) -> None:
    """Print the plan of a matrix: the builds of each model and variant, and how long all of them take, ``count`` at a
    time."""
    least, most = (sum(len(group.jobs) * group.seconds[at] for group in groups) / max(1, count) for at in (0, 1))
    if as_json:
        rows = [
            {
                **{name: getattr(group, name) for name in ("model", "variant", "memory", "seconds", "device", "why")},
                "builds": [job.name for job in group.jobs],
            }
            for group in groups
        ]
        print(json.dumps({"groups": rows, "at_once": count, "range": [least, most]}, indent=2))
        return
    from erasec.checkpoint.disk import size
    from erasec.reporting.format import about

    cells = [
        [
            group.model,
            group.variant or "–",
            f"{len(group.jobs)}",
            size(group.memory) if group.memory else "–",
            group.why or about(*group.seconds),
        ]
        for group in groups
    ]
    table(["model", "variant", "builds", "memory of each", "time of each"], cells)
    print(f"{sum(len(group.jobs) for group in groups)} builds, {count} at a time: {about(least, most)}")


def print_facts(folder: Path) -> None:
    """Print the report.json of a build, if there is one: a build may fail before it."""
    if (file := folder / "report.json").is_file():
        print(file.read_text(encoding="utf-8"))


def print_plan(plan: dict[str, Any], all_sites: bool = False) -> None:
    """Print a plan, given as ``commands.plan.describe`` returns it. Sites are grouped unless ``all_sites``."""
    from erasec.checkpoint.disk import size
    from erasec.reporting.format import about
    from erasec.reporting.wording import by_origin

    model, disk, memory = plan["model"], plan["disk"], plan["memory"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    lines = [("model", f"{model['name']} ({model['family']}){revision}")]
    for concept in plan["concepts"][:LISTED]:
        phrases = ", ".join((*concept["erase"], *concept["synonyms"]))
        lines.append(("erase", f"{concept['name']}: {phrases} -> {concept['anchor'] or 'the empty prompt'}"))
        if concept["counterparts"]:
            lines.append(("", f"but {', '.join(f'{phrase} -> {goal}' for phrase, goal in concept['counterparts'])}"))
        lines.append(("", f"keeps {', '.join(concept['keep']) or 'no phrase in particular'}"))
    if further := [concept["name"] for concept in plan["concepts"][LISTED:]]:
        lines.append(("erase", f"{len(further)} more: {words(further, LISTED)} (--json lists all of them in full)"))
    for step in plan["passes"]:
        lines.append(("pass", f"{step['name']} ({step['paper']})" + (f", {step['reason']}" if step["reason"] else "")))
        for title, options in by_origin(step["options"], step["origins"]):
            lines.append(("", f"{title}: {', '.join(f'{key}={value}' for key, value in options.items())}"))
    for target in plan["targets"]:
        lines.append(("target", f"{target['name']}: {target['summary']}; about {size(target['bytes'])}"))
    duration = plan["time"]
    limits = [duration["seconds"]] * 2 if duration["seconds"] else duration["range"]
    fit = f" to fit {size(memory['limit'])}" if memory["limit"] else ""
    lines += [
        ("judge", plan["judge"] or "no judge knows this model: pictures are not checked"),
        ("paint", plan["pictures"]["how"]),
        *(("file", f"{file['name']}: {file['used']} of {file['total']} {file['holds']}") for file in plan["files"]),
        ("out", disk["out"]),
        ("disk", f"{size(disk['needed'])} needed, {size(disk['free'])} free ({disk['how']})"),
        ("memory", f"{size(memory['bytes'])} ({memory['how']})"),
        *(("", f"{name} trains{fit} with {measures}") for name, measures in memory["measures"].items()),
        ("time", f"{about(*limits)}; {duration['how']}"),
        *(("", f"{name}: {about(*each)}") for name, each in duration["steps"].items()),
        ("device", f"{plan['device']}, seed {plan['seed']}"),
        ("tools", ", ".join(f"{name} {version}" for name, version in plan["tools"].items())),
        *(("note", note) for note in plan["notes"][:LISTED]),
    ]
    if len(plan["notes"]) > LISTED:
        lines.append(("note", f"{len(plan['notes']) - LISTED} more notes: --json"))
    lines += [("end", plan["end"])] if plan["end"] else []
    for label, text in lines:
        print(f"{label:>6}  {printable(text)}")
    if "apart" in plan:
        _print_pairs(plan["apart"])
    for step in plan["passes"]:
        parameters = sum(group["parameters"] for group in step["groups"])
        print(f"\n{step['name']} edits {len(step['sites'])} tensors with {parameters:,} parameters")
        if all_sites:
            rows = [[s["block"], s["attn"], s["proj"], "x".join(map(str, s["shape"]))] for s in step["sites"]]
            table(["block", "attention", "projection", "shape"], rows)
        elif step["groups"]:
            rows = [
                [g["part"], g["attn"], g["proj"], str(g["tensors"]), f"{g['parameters']:,}"] for g in step["groups"]
            ]
            table(["part", "attention", "projection", "tensors", "parameters"], rows)


def _print_pairs(pairs: list[dict[str, Any]]) -> None:
    if not pairs:
        print("\nno phrase is kept, so there is nothing to keep apart from what is erased")
        return
    print("\nkept phrases nearest to erased ones, by the angle between their text states")
    rows = [[printable(pair["erased"]), printable(pair["kept"]), f"{pair['angle']:.0f} degrees"] for pair in pairs]
    table(["erased", "kept", "angle"], rows[:LISTED])
    if len(rows) > LISTED:
        print(f"{len(rows) - LISTED} more: --json")


def passes() -> None:
    """Print every pass with its options, and on the next line when to use it."""
    rows = []
    for name in registry.passes():
        kind = registry.load_pass(name)
        kinds = [concept_kind or "none" for concept_kind, default in registry.DEFAULTS.items() if default == name]
        rows.append([name, kind.summary, kind.paper, options(kind)])
        notes = [kind.when] if kind.when else []
        notes += [f"the default for concepts of kind {', '.join(kinds)}"] if kinds else []
        rows += [["", "; ".join(notes), "", ""]] if notes else []
    table(["pass", "summary", "paper", "options with defaults and ranges"], rows)


def targets() -> None:
    """Print every target with its options."""
    kinds = {name: registry.load_target(name) for name in registry.targets()}
    rows = [[name, kind.summary, options(kind)] for name, kind in kinds.items()]
    table(["target", "summary", "options with defaults and ranges"], rows)


def judges() -> None:
    """Print every judge with its options, and how it becomes usable if it is not."""
    rows = []
    for name in registry.judges():
        kind = registry.load_judge(name)
        settings = options(kind.settings) if kind.settings else ""
        rows.append([name, kind.summary, settings, kind.needs() or "yes"])
    table(["judge", "summary", "options with defaults and ranges", "usable"], rows)


def probes() -> None:
    """Print every probe of an audit with what the attacker has, and its options."""
    kinds = {name: registry.load_probe(name) for name in registry.probes()}
    rows = [[name, kind.threat, kind.summary, options(kind)] for name, kind in kinds.items()]
    table(["probe", "attacker", "summary", "options with defaults and ranges"], rows)


def runtimes() -> None:
    """Print every runtime with its summary and the targets whose folders it runs."""
    kinds = {name: registry.load_runtime(name) for name in registry.runtimes()}
    rows = [[name, kind.summary, ", ".join(kind.folders)] for name, kind in kinds.items()]
    table(["runtime", "summary", "targets"], rows)


def options(kind: type) -> str:
    """The options of a pass, target, judge or probe as users type them, with their defaults and ranges."""
    from erasec.options import ranges

    limits, cells = ranges(kind), []
    for field in dataclasses.fields(kind):
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        limit = f" ({limits[field.name]})" if limits[field.name] else ""
        cells.append(f"{field.name}={value}{limit}")
    return ", ".join(cells)


def concepts() -> None:
    """Print every bundled concept with its first phrases and the default pass for its kind."""
    from erasec.recipe.concept import from_file, library, worlds

    rows = []
    files = [*library().items()]
    for world in worlds():
        files += [(name, path) for name, path in library(world).items() if path.parent.name == world]
    for name, path in files:
        concept = from_file(path)
        more = f", and {len(concept.phrases) - 3} more" if len(concept.phrases) > 3 else ""
        rows.append(
            [
                name,
                concept.kind or path.parent.name,
                registry.DEFAULTS[concept.kind],
                ", ".join(concept.phrases[:3]) + more,
                concept.anchor,
                str(path),
            ]
        )
    table(["concept", "kind", "pass", "erases", "anchor", "file"], rows)


def models() -> None:
    """Print the names of models and where each comes from."""
    from erasec.family import HUB
    from erasec.model.loading import BUNDLED, is_bundled

    rows = [[name, "bundled" if is_bundled(name) else "bundled, missing here"] for name in BUNDLED]
    table(["model", "where"], rows + [[name, f"hub: {repository}"] for name, repository in HUB.items()])


def findings(results: Sequence[Finding]) -> None:
    """Print the table of ``erasec doctor``."""
    rows = [[item.name, "ok" if item.available else "missing", item.detail, item.fix] for item in results]
    table(["what", "state", "detail", "fix"], rows)


def checks(results: Sequence[Check]) -> None:
    """Print the name, outcome, value and limit of each check, and how it was measured."""
    rows = [[check.name, check.outcome, number(check.value), number(check.limit), check.how] for check in results]
    table(["check", "outcome", "value", "limit", "how"], rows)


def differences(items: Sequence[Difference]) -> None:
    """Print the tensors that differ, then the files, and how many tensors there are."""
    tensors = [item for item in items if item.kind != "file"]
    if tensors:
        rows = [
            [
                item.key,
                item.kind,
                number(item.change),
                number(item.largest),
                "-" if item.rank is None else str(item.rank),
                item.note,
            ]
            for item in tensors
        ]
        table(["tensor", "what", "change", "largest", "rank", "note"], rows)
    if files := [item for item in items if item.kind == "file"]:
        table(["file", "note"], [[item.key, item.note] for item in files])
    print(f"{len(tensors)} tensors differ" if tensors else "no tensor differs")


def number(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    return "-" if value is None else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with lines on a terminal, as aligned plain text otherwise. Cells may come from files."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


LISTS = {
    "passes": passes,
    "targets": targets,
    "judges": judges,
    "probes": probes,
    "runtimes": runtimes,
    "concepts": concepts,
    "models": models,
}
