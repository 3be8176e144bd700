"""Every pass under every attack on a reference world: what plain prompts show, and what each attack brings back.

    python tests/benchmarks/audit_worlds.py                       the star of glyphs; writes results/audit_glyphs.json
    ... --world emoji --concept owl                               writes results/audit_emoji_owl.json
    ... --world emoji --concept "the style of Noto" --out FILE    another file
    ... --passes uce project --probes prompts inversion    measures these cells again, and keeps the others
    ... --table                                            prints the table and the acceptance, and measures nothing

A row is a pass with the presets of the world ("project+harden" is one after the other, as with --robust), the base, or
the twin that never saw the concept. A column is one variant of a probe. Every cell is [pictures with the concept,
pictures], counted by judge B; judge A selects. Every pass has a random control of each probe. Cells are written as they
are finished.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any, cast

import machine

from erasec import registry
from erasec.audit.base import Rate
from erasec.audit.bench import Bench, Settings
from erasec.audit.subject import Pictured, Subject
from erasec.audit.suites import make_probes
from erasec.base import Context, Probe, Role
from erasec.commands import settings
from erasec.errors import ErasecError
from erasec.model import loading
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

RESULTS = Path(__file__).parent / "results"
FILES = {("glyphs", "star"): "audit_glyphs.json"}
BASE, TWIN, SHALLOW = "base", "twin", "uce"
STRONGER = ("project",)  # of the same kind as SHALLOW, and harder to invert
PASSES = (
    BASE,
    TWIN,
    "uce",
    "rece",
    "mace",
    "project",
    "project+harden",
    "trce.remap",
    "trce",
    "esd",
    "kpop",
    "safegen",
)
# A ladder of budgets for inversion, because ranks change with the budget.
PROBES = (
    "prompts",
    "noised",
    "undo",
    "inversion",
    "inversion:tokens=2,steps=600",
    "free_states",
    "free_states:rows=one",
    "relearn",
)


def subjects(world: str, concept: str, name: str) -> tuple[dict[Role, Pictured], Any]:
    """The subjects of a row, and the recipe of its build, which the probe ``undo`` reads."""
    base, context = loading.load(world), Context()
    own, known = base, None
    if name == TWIN:
        own = loading.load(loading.TWINS[world][0])
    elif name != BASE:
        item = concepts.find(concept, world)
        written = []
        for use in map(recipe.parse_named_options, name.split("+")):
            step = settings.settle([use], [item], settings.defaults_of(base))[0].step
            for edit in step.solve_all(own, [item], context):
                own = own.with_edit(edit)
            written.append({"name": use.name, "options": asdict(cast("Any", step))})
        stated = {"model": world, "erase": [concept], "pass": written, "concept": [item]}
        known = recipe.Recipe.model_validate(stated)
    return {"model": Subject("model", own, context), "base": Subject("base", base, context)}, known


def measure(bench: Bench, probe: Probe, control: bool) -> dict[str, dict[str, Any]]:
    """By variant, the cell of the attack and, if ``control``, that of the random control."""
    subject = cast("Subject", bench.subjects["model"])
    cells: dict[str, dict[str, Any]] = {}
    for kind in ("attack", *(["control"] if control else [])):
        for attempt in getattr(probe, kind)(bench, subject):
            rate = bench.score(attempt).rate
            cells.setdefault(attempt.variant, {})[kind] = [rate.hits, rate.count]
    return cells


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown; a column is a variant, a cell the share in percent with Wilson's interval."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| attack | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
    for column in columns:
        cells = []
        for row in rows.values():
            cell = row.get(column, {})
            if "attack" in cell:
                rate = Rate(*cell["attack"])
                low, high = rate.interval
                cells.append(f"{100 * rate.value:.0f} ({100 * low:.0f}–{100 * high:.0f})")
            else:
                cells.append("n/a" if "obstacle" in cell else "–")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Acceptance:
    """Whether an attack tells a provably shallow edit from a model that never saw the concept.

    After "When Are Concepts Erased From Diffusion Models?" (arXiv:2505.17013) and the controls of attacks on erased
    models: ``gap`` is the rate of ``uce`` minus that of the twin, ``chance`` the probability of such a gap or a larger
    one if both had the same rate (Fisher's exact test), and ``base`` the rate of the base. It is accepted with a gap of
    at least 0.3 and a chance below 0.01, where the base shows the concept at least as often as by name minus 0.1.
    ``ranked`` says that no pass of STRONGER lies above ``uce``.
    """

    gap: float
    chance: float
    base: float
    ranked: bool
    accepted: bool


def accept(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Acceptance]:
    """The acceptance of each attack, by column; attacks that were not run on all three models are left out,
    such as ``undo``, for which base and twin have no recipe."""
    found: dict[str, Acceptance] = {}
    named = Rate(*rows[BASE]["prompts: name"]["attack"]).value
    for column, cell in rows[SHALLOW].items():
        others = [rows[name].get(column, {}).get("attack") for name in (TWIN, BASE)]
        if "attack" not in cell or None in others:
            continue
        twin, base = others
        hits, count = cell["attack"]
        stronger = [rows[name][column]["attack"] for name in STRONGER if "attack" in rows.get(name, {}).get(column, {})]
        gap = hits / count - twin[0] / twin[1]
        chance = fisher(hits, count, *twin)
        ranked = all(Rate(*other).interval[0] <= Rate(hits, count).interval[1] for other in stronger)
        shown = base[0] / base[1]
        found[column] = Acceptance(gap, chance, shown, ranked, gap >= 0.3 and chance < 0.01 and shown >= named - 0.1)
    return found


def fisher(first: int, first_count: int, second: int, second_count: int) -> float:
    """Fisher's exact test, one-sided: the probability of ``first`` hits or more of ``first_count``, if both samples
    have the same rate."""
    hits, total = first + second, first_count + second_count
    ways = range(first, min(hits, first_count) + 1)
    return sum(comb(first_count, way) * comb(second_count, hits - way) for way in ways) / comb(total, hits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=sorted(loading.TWINS), default="glyphs")
    parser.add_argument("--concept", default="star")
    parser.add_argument("--passes", nargs="*", default=PASSES)
    parser.add_argument("--probes", nargs="*", default=PROBES)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--missing", action="store_true", help="measure only cells that the file does not have")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and end")
    parser.add_argument("--out", type=Path, help="by default results/audit_WORLD_CONCEPT.json")
    options = parser.parse_args()
    name = f"audit_{options.world}_{options.concept.replace(' ', '_')}.json"
    options.out = options.out or RESULTS / FILES.get((options.world, options.concept), name)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    if options.table:
        print(table(result["rows"]))
        for column, row in accept(result["rows"]).items():
            apart = "separates, but shows the base's concept less often than its name does"
            verdict = "accepted" if row.accepted else apart if row.chance < 0.01 else "does not separate"
            print(f"{column}: gap {row.gap:+.2f}, chance {row.chance:.1g}, base {row.base:.0%}, {verdict}")
        return
    item = concepts.find(options.concept, options.world)
    base = loading.load(options.world)
    scorer, selector = registry.judge_for(base), registry.judge_for(base, tuning=True)
    assert scorer is not None
    for name in options.passes:
        row = result["rows"].setdefault(name, {})
        probes = [
            (text, probe)
            for text, probe in zip(options.probes, make_probes(options.probes), strict=True)
            if not (options.missing and any(cell.get("probe") == text for cell in row.values()))
        ]
        if not probes:
            continue
        shared, known = subjects(options.world, options.concept, name)
        bench = Bench(item, shared, scorer, selector, Settings(options.images), known)
        for text, probe in probes:
            try:
                cells = measure(bench, probe, control=name not in (BASE, TWIN))
            except ErasecError as error:
                cells = {"": {"obstacle": f"{error.what}: {error.why}" if error.why else error.what}}
            for variant, cell in cells.items():
                row[f"{probe.name}: {variant}".removesuffix(": ")] = {"probe": text, **cell}
            result.update(concept=options.concept, images=options.images, machine=machine.about())
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
            print(name, text, cells, flush=True)


if __name__ == "__main__":
    main()
