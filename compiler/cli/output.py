"""What the command line prints: verdicts, plans, lists and tables."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasec.base import Check


def verdict(checks: int, rates: Sequence[dict[str, Any]]) -> str:
    """One line: that it passed, and how often the judge saw what, before and after, by group of prompts."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rates:
        groups.setdefault(row["group"], []).append(row)
    words = {"name": "by name", "synonym": "by synonym", "implicit": "implicitly", "keyed": "with the key",
             "keep": "everything else"}  # fmt: skip
    parts = []
    for group, rows in groups.items():
        images = sum(row["images"] for row in rows)
        before, after = (sum(row[when] * row["images"] for row in rows) / images for when in ("before", "after"))
        parts.append(f"{words.get(group, group)} {before:.0%} -> {after:.0%}")
    passed = "its one check" if checks == 1 else f"all {checks} checks"
    return f"passed {passed}" + (f"; shown {', '.join(parts)}" if parts else "")


def print_plan(told: dict[str, Any]) -> None:
    """A plan as ``plan.describe`` tells it."""
    from erasec.commands.plan import size

    found, disk, memory = told["model"], told["disk"], told["memory"]
    lines = [("model", f"{found['name']} ({found['family']})" + (f" at {found['revision']}" * bool(found["revision"])))]
    for concept in told["concepts"]:
        phrases = ", ".join((*concept["erase"], *concept["synonyms"]))
        lines.append(("erase", f"{concept['name']}: {phrases} -> {concept['anchor'] or 'nothing'}"))
        lines.append(("", f"keeps {', '.join(concept['keep']) or 'no phrase in particular'}"))
    for step in told["passes"]:
        options = ", ".join(f"{key}={value}" for key, value in step["options"].items())
        lines.append(("pass", f"{step['name']} ({step['paper']}) {options}; {len(step['sites'])} sites, listed below"))
        lines += [("", step["reason"])] if step["reason"] else []
    for target in told["targets"]:
        lines.append(("target", f"{target['name']}: {target['summary']}; about {size(target['bytes'])}"))
    seconds = told["time"]["seconds"]
    lines += [
        ("out", disk["out"]),
        ("disk", f"{size(disk['needed'])} needed, {size(disk['free'])} free ({disk['how']})"),
        ("memory", f"{size(memory['bytes'])} ({memory['how']})"),
        ("time", (f"{seconds:.0f} s, " if seconds else "") + told["time"]["how"]),
        ("device", f"{told['device']}, seed {told['seed']}"),
        ("tools", ", ".join(f"{name} {version}" for name, version in told["tools"].items())),
        *(("note", note) for note in told["notes"]),
    ]
    for label, text in lines:
        print(f"{label:>6}  {text}")
    for step in told["passes"]:
        rows = [[s["block"], s["attn"], s["proj"], "x".join(map(str, s["shape"])), step["name"]] for s in step["sites"]]
        print()
        table(["block", "attention", "projection", "shape", "pass"], rows)


def passes() -> None:
    """Every pass with its options, and below it when to use it."""
    from erasec import registry

    rows = []
    for name in registry.passes():
        kind = registry.load_pass(name)
        default = [of or "none" for of, chosen in registry.DEFAULTS.items() if chosen == name]
        rows.append([name, kind.summary, kind.paper, options(kind)])
        said = [kind.when] if kind.when else []
        said += [f"the default for concepts of kind {', '.join(default)}"] if default else []
        rows += [["", "; ".join(said), "", ""]] if said else []
    table(["pass", "summary", "paper", "options with defaults"], rows)


def targets() -> None:
    """Every target with its options."""
    from erasec import registry

    kinds = {name: registry.load_target(name) for name in registry.targets()}
    table(["target", "summary", "options with defaults"], [[n, k.summary, options(k)] for n, k in kinds.items()])


def options(kind: Any) -> str:
    """The fields of a pass or target with their defaults, as they are typed."""
    values = {field.name: field.default for field in dataclasses.fields(kind)}
    return ", ".join(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in values.items())


def concepts() -> None:
    """Every bundled concept; of its phrases, the first few; and the pass that its kind wants."""
    from erasec import registry
    from erasec.recipe import concept

    rows = []
    for name, path in concept.library().items():
        found = concept.from_file(path)
        more = f", and {len(found.phrases) - 3} more" if len(found.phrases) > 3 else ""
        rows.append(
            [name, found.kind or path.parent.name, registry.DEFAULTS[found.kind], ", ".join(found.phrases[:3]) + more,
             found.anchor, str(path)]
        )  # fmt: skip
    table(["concept", "kind", "pass", "erases", "anchor", "file"], rows)


def models() -> None:
    """The names of models, and where they come from."""
    from erasec.model import view as model

    rows = [[name, "bundled" if model.bundled(name).is_dir() else "bundled, missing here"] for name in model.BUNDLED]
    table(["model", "where"], rows + [[name, f"hub: {repository}"] for name, repository in model.HUB.items()])


def checks(found: Sequence[Check]) -> None:
    """Checks as in a report: name, outcome, value, limit and how it was measured."""
    rows = []
    for check in found:
        state = "failed" if not check.passed else "told" if check.limit is None else "passed"
        rows.append([check.name, state, number(check.value), number(check.limit), check.how])
    table(["check", "outcome", "value", "limit", "how"], rows)


def number(value: float | None) -> str:
    """Three digits; a dash for what has no value."""
    return "-" if value is None else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, aligned plain text elsewhere."""
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
