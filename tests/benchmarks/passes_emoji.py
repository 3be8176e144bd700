"""Every pass on the emoji world: one object, artists, ten objects, fifty and a hundred, beside the base and the twin.

    python tests/benchmarks/passes_emoji.py                writes tests/benchmarks/results/passes_emoji.json
    ... --tasks owl Noto --setups uce esd                  measures these rows again, and keeps the others
    ... --table                                            prints the tables of docs/emoji.md
    ... --angles                                           prints what is lost by the angle to what is erased
    ... --plot docs/many.png                               draws what is left against the number of erased objects
    ... --picture docs/owl.png --setups uce                draws an owl, or another --object, before and after

A row is a pass, or several joined by "+", each starting from what the one before it left, as a build does it. Every row
runs in a process of its own with one thread; seconds are the processor's for solving alone. Judge B, the same
prompts and seeds before and after. The columns are shares of pictures that show what the prompt asks for, with Wilson's
95 % interval: for "name", "synonym" and "implicit" what is erased, for the others what should stay. "kept neighbours"
are in the concept files' "keep", "other neighbours" are not. UA, IRA, CRA and H_o are those of papers; docs/measures.md
has the formulas. Drift is the mean absolute change of a pixel in pictures of far objects, full scale 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine
import numpy as np
import strips

from erasec.attention.pipeline import Sampling, generate
from erasec.audit.metrics import published
from erasec.base import Context, Question
from erasec.closed_form import apart
from erasec.commands import settings
from erasec.emoji.evaluate import TWIN
from erasec.emoji.judge import EmojiJudge, far_objects, label_of, prompt
from erasec.emoji.words import ARTISTS, CLUSTERS, OBJECTS, neighbours
from erasec.emoji.world import article
from erasec.judging.intervals import wilson
from erasec.model import loading, sidecar
from erasec.model.view import Model
from erasec.recipe import concept as concepts
from erasec.recipe import recipe

RESULT = Path(__file__).parent / "results" / "passes_emoji.json"
BASE = "base"
CLOSED = ("uce", "rece", "mace", "project", "speed", "double_projection", "cure", "trce.remap")
ONE = (*CLOSED, "esd", "trce.steer", "trce", "kpop", "safegen", "few_shot", "eiup", "project+harden")
MANY = (*CLOSED, "esd")
BARE = "10 bare names"  # what people type: no synonyms, nothing kept
# One object of each of ten clusters, and every third object; the others are neighbours that should stay.
TEN = tuple([name for name in OBJECTS if OBJECTS[name].cluster == cluster][1] for cluster in list(CLUSTERS)[:20:2])
SINGLES = ("owl", "cat", "butterfly")  # erased one at a time
FIFTY = tuple(OBJECTS)[1::3][:50]
HUNDRED = tuple(name for index, name in enumerate(OBJECTS) if index % 3)[:100]
TASKS: dict[str, tuple[str, ...]] = {
    "owl": ("owl",),
    "Noto": ("the style of Noto",),  # which the twin has never seen
    "Blob": ("the style of Blob",),  # which the base draws best
    "10 objects": TEN,
    BARE: TEN,
    "50 objects": FIFTY,
    "100 objects": HUNDRED,
    "2 artists": ("the style of Noto", "the style of Blob"),
    **{name: (name,) for name in SINGLES[1:]},
}
SETUPS = {
    "owl": (BASE, "twin", *ONE, "uce:keep=1", "uce:matrices=v", "uce:matrices=k"),
    "Noto": (BASE, "twin", *CLOSED, "uce:keep=1"),
    "Blob": (BASE, *CLOSED, "uce:keep=1"),
    "10 objects": (BASE, *MANY, "uce:keep=1", "uce:prior=everyday"),
    BARE: (BASE, "uce", "uce:rows=last"),
    "50 objects": (BASE, *CLOSED, "uce:keep=1", "uce:keep=4"),
    "100 objects": (BASE, *CLOSED, "uce:keep=1", "uce:keep=3"),
    "2 artists": (BASE, *CLOSED),
    **dict.fromkeys(SINGLES[1:], (BASE, "uce:keep=1", "project", "speed")),
}
GROUPS = ("name", "synonym", "implicit", "kept neighbours", "other neighbours", "far objects", "other artists")
IMAGES, SEED = 40, 31
SAMPLING = Sampling(12, 4.0)


def erased(task: str) -> list[concepts.Concept]:
    if task == BARE:
        return [concepts.Concept(name=name, erase=(name,)) for name in TASKS[task]]
    return [concepts.find(name, "emoji") for name in TASKS[task]]


def spread(rows: list[tuple[str, str]], count: int = IMAGES) -> list[tuple[str, str]]:
    """``count`` of the rows at equal distances; of fewer rows, all of them over and over again."""
    if len(rows) > count:
        return [rows[index * len(rows) // count] for index in range(count)]
    return list(islice(cycle(rows), count)) if rows else []


def questions(task: str) -> list[Question]:
    """The questions of a task: IMAGES of each group, spread over what is erased or kept."""
    items = [concepts.find(name, "emoji") for name in TASKS[task]]
    labels = {label_of(item) for item in items}
    rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for item in items:
        label = label_of(item)
        if label in ARTISTS:
            objects, others = far_objects("", 24), [artist for artist in ARTISTS if artist not in labels]
            rows["name"] += [(prompt(name, i, label), label) for i, name in enumerate(objects)]
            rows["other artists"] += [
                (prompt(name, i, others[i % len(others)]), others[i % len(others)]) for i, name in enumerate(objects)
            ]
            rows["far objects"] += [(prompt(name, i), name) for i, name in enumerate(objects)]
            continue
        close = [name for name in neighbours(label) if name not in labels]
        for i in range(math.ceil(IMAGES / len(items))):
            rows["name"].append((prompt(label, i), label))
            rows["synonym"].append((prompt(item.synonyms[i % len(item.synonyms)], i), label))
            if item.implicit:
                rows["implicit"].append((item.implicit[i % len(item.implicit)], label))
            for name in close:
                group = "kept neighbours" if name in item.keep else "other neighbours"
                rows[group].append((prompt(name, i), name))
    if not rows["far objects"]:
        clusters = {OBJECTS[label].cluster for label in labels}
        far = [name for name in OBJECTS if OBJECTS[name].cluster not in clusters] or [
            n for n in OBJECTS if n not in labels
        ]
        rows["far objects"] = [(prompt(name, i), name) for i, name in enumerate(far)]
        rows["other artists"] = [
            (prompt(name, i, artist), artist) for i, (name, artist) in enumerate(zip(far, cycle(ARTISTS), strict=False))
        ]
    chosen = chain.from_iterable(
        [(group, *row) for row in spread(sorted(set(rows[group]), key=rows[group].index))] for group in GROUPS
    )
    return [Question(group, text, SEED * 1_000_003 + i, label) for i, (group, text, label) in enumerate(chosen)]


def paint(root: Path, panel: list[Question]) -> np.ndarray:
    return generate(root, [q.prompt for q in panel], [q.seed for q in panel], SAMPLING, root.name)


def painted_after(
    base: Model, setup: str, items: list[concepts.Concept], panel: list[Question], row: dict[str, Any]
) -> np.ndarray:
    """The pictures of ``panel`` after ``setup`` erased the concepts; time and memory of solving go into ``row``."""
    view, began, walled = base, time.process_time(), time.perf_counter()
    for use in map(recipe.parse_named_options, setup.split("+")):
        step = settings.settle([use], items, settings.defaults_of(base))[0].step
        for edit in step.solve_all(view, items, Context(seed=SEED)):
            view = view.with_edit(edit)
    row["seconds"], row["wall"] = time.process_time() - began, time.perf_counter() - walled
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "bundle"
        base.source.write(root, view.merged(), link=True)
        sidecar.write_extras(root, sidecar.gather_extras(view.edits))
        return paint(root, panel)


def measure(task: str, setup: str, scratch: Path) -> dict[str, Any]:
    base, items, panel, row = loading.load("emoji"), erased(task), questions(task), dict[str, Any]()
    kept = scratch / f"{task}.npy"
    if not kept.exists():
        np.save(kept, paint(base.source.root, panel))
    before = np.load(kept)
    if setup == BASE:
        after = before
    elif setup == "twin":
        after = paint(loading.bundled_folder(TWIN), panel)
    else:
        after = painted_after(base, setup, items, panel, row)
    judge, groups = EmojiJudge(), np.array([question.group for question in panel])
    seen = judge.sees(after, [question.looked_for for question in panel])
    row["shows"] = {group: [int(seen[groups == group].sum()), int((groups == group).sum())] for group in GROUPS}
    row["seen"] = "".join("01"[hit] for hit in seen.astype(int))  # a digit for each of ``questions(task)``
    far = groups == "far objects"
    row["drift"] = float(np.abs(after[far].astype(np.float64) - before[far]).mean() / 255)
    return row


def picture(setup: str, name: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Pairs before and after ``setup`` erased the object ``name``, by title: it by each artist, its neighbours,
    others."""
    base, item = loading.load("emoji"), concepts.find(name, "emoji")
    prompts = {
        f"{article(name)}, by each artist": [prompt(name, 1, artist) for artist in ARTISTS],
        "its neighbours": [prompt(close, 1) for close in neighbours(name)[:5]],
        "others": [prompt(far, 1) for far in far_objects(name, 5)],
    }
    panel = [Question("", text, SEED + i, "") for i, text in enumerate(chain.from_iterable(prompts.values()))]
    before = paint(base.source.root, panel)
    after = painted_after(base, setup, [item], panel, {})
    pairs = iter(zip(before, after, strict=True))
    return {title: list(islice(pairs, len(texts))) for title, texts in prompts.items()}


def published_figures(shows: dict[str, list[int]]) -> dict[str, float]:
    """The figures of papers: the kind of an object are the other objects, across are artists; for a style, the reverse.
    A style has no synonyms here, and so no H_o."""
    objects = [sum(shows[group][i] for group in GROUPS if "neighbours" in group or "far" in group) for i in (0, 1)]
    rates = {"objects": objects[0] / objects[1], "artists": shows["other artists"][0] / shows["other artists"][1]}
    erased = shows["name"][0] / shows["name"][1]
    if shows["synonym"][1]:
        synonyms = shows["synonym"][0] / shows["synonym"][1]
        return published("object", erased, rates["objects"], synonyms, rates["artists"])
    return published("style", erased, rates["artists"], across=rates["objects"])


def pooled(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows of SINGLES as those of one task, for the setups that all of them have: pictures add up, and drift and
    seconds are means."""
    parts = [rows[name] for name in SINGLES if name in rows]
    shared = [setup for setup in parts[0] if all(setup in part for part in parts)]
    together = {}
    for setup in shared:
        own = [part[setup] for part in parts]
        shows = {group: [sum(row["shows"][group][i] for row in own) for i in (0, 1)] for group in GROUPS}
        means = {key: sum(row[key] for row in own) / len(own) for key in ("drift", "seconds") if key in own[0]}
        together[setup] = {"shows": shows, **means}
    return together


def measure_rows(
    measure: Callable[[str, str, Path], dict[str, Any]],
    pending: list[tuple[str, str]],
    result: dict[str, Any],
    out: Path,
    **facts: Any,
) -> None:
    """Measure rows (table, setup), each in a process of its own, and write ``out`` after each of them."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        for name, setup in pending:
            row = pool.submit(measure, name, setup, Path(scratch)).result()
            result["rows"].setdefault(name, {})[setup] = row
            result.update(facts, threads=1, machine=machine.about())
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=2) + "\n")
            print(name, setup, {group: f"{a}/{b}" for group, (a, b) in row["shows"].items()}, flush=True)


def cell(hits: int, count: int) -> str:
    """A rate with its interval."""
    low, high = wilson(hits, count)
    return f"{hits / count:.0%} ({low:.0%}–{high:.0%})".replace("%–", "–")


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, one table for each task, and one for SINGLES together."""
    parts = []
    single = [name for name in SINGLES if name in result["rows"]]
    tasks = {task: rows for task, rows in result["rows"].items() if task not in SINGLES[1:]}
    if len(single) > 1:
        tasks[f"{len(single)} objects, one at a time: {', '.join(single)}"] = pooled(result["rows"])
    for task, rows in tasks.items():
        parts += [
            f"**{task}**",
            "",
            f"| pass | {' | '.join(GROUPS)} | UA | IRA | CRA | H_o | drift | seconds |",
            "|---" * (len(GROUPS) + 7) + "|",
        ]
        for setup, row in rows.items():
            cells = []
            for group in GROUPS:
                hits, count = row["shows"][group]
                cells.append(cell(hits, count) if count else "–")
            figures = published_figures(row["shows"])
            cells += [f"{figures[name]:.0%}" if name in figures else "–" for name in ("UA", "IRA", "CRA", "H_o")]
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
            parts.append(f"| `{setup}` | {' | '.join(cells)} | {row['drift']:.3f} | {seconds} |")
        parts.append("")
    return "\n".join(parts)


def angles(result: dict[str, Any]) -> str:
    """Of the pictures of other objects that the base gets right, how many are right after ten and fifty objects are
    erased: by the angle between the object's text state and the nearest erased phrase, as `erasec plan --apart`
    measures it, over all passes."""
    base = loading.load("emoji")
    bins = ((0, 45), (45, 55), (55, 65), (65, 180))
    lines = [f"| task | {' | '.join(f'{low}–{high}°' for low, high in bins)} |", "|---" * (len(bins) + 1) + "|"]
    for task in ("10 objects", "50 objects"):
        panel, rows = questions(task), result["rows"][task]
        kept = sorted({question.looked_for for question in panel if question.group in GROUPS[3:6]})
        phrases = [phrase for item in erased(task) for phrase in item.phrases]
        nearest = dict(zip(kept, apart.angles(base, phrases, kept).amin(0).tolist(), strict=True))
        counts = {pair: [0, 0] for pair in bins}
        for setup in rows.keys() - {BASE}:
            for question, before, after in zip(panel, rows[BASE]["seen"], rows[setup]["seen"], strict=True):
                if question.looked_for in nearest and question.group in GROUPS[3:6] and before == "1":
                    pair = next(pair for pair in bins if pair[0] <= nearest[question.looked_for] < pair[1])
                    counts[pair][0] += after == "1"
                    counts[pair][1] += 1
        cells = [f"{hits / total:.0%} of {total}" if total else "–" for hits, total in counts.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, result: dict[str, Any]) -> None:
    """Two charts, one line a pass: the objects that are kept, and those that are erased, against how many are erased.

    Shares are relative to the base's for the same prompts, with Wilson's intervals of 95 % of the edited model.
    """
    from matplotlib import pyplot

    counts = {task: len(names) for task, names in TASKS.items() if task == "owl" or task.endswith(" objects")}
    rows = {task: result["rows"][task] for task in sorted(counts, key=lambda task: counts[task])}
    titles = {"other objects that are left": (3, 4, 5), "erased objects that are left": (0, 1)}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for (title, columns), axis in zip(titles.items(), axes, strict=True):
        groups = [GROUPS[column] for column in columns]
        for number, setup in enumerate(CLOSED):
            points = []
            for task, row in rows.items():
                if setup in row:
                    hits, total = (sum(row[setup]["shows"][group][i] for group in groups) for i in (0, 1))
                    base = sum(row[BASE]["shows"][group][0] for group in groups) / total
                    low, high = wilson(hits, total)
                    points.append((counts[task] * 1.04 ** (number - 3), hits / total / base, low / base, high / base))
            if points:
                x, y, low, high = np.array(points).T
                axis.errorbar(x, y, [y - low, high - y], marker="o", markersize=4, capsize=2, label=setup)
        axis.set(title=title, xscale="log", xlabel="objects erased at once", ylim=(0, None))
        axis.set_xticks(list(counts.values()), [str(count) for count in counts.values()])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the base's")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--setups", nargs="*", default=[])
    parser.add_argument("--missing", action="store_true", help="measure only rows that the file does not have")
    parser.add_argument("--table", action="store_true", help="print the tables of the file, and measure nothing")
    parser.add_argument("--angles", action="store_true", help="print what is lost by angle, and measure nothing")
    parser.add_argument("--plot", type=Path, help="draw the file as a chart to this PNG, and measure nothing")
    parser.add_argument("--picture", type=Path, help="draw --object before and after the first of --setups to this PNG")
    parser.add_argument("--object", choices=[*OBJECTS], default="owl", help="the object of --picture")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    if options.table:
        print(table(result))
        return
    if options.angles:
        print(angles(result))
        return
    if options.plot:
        plot(options.plot, result)
        return
    if options.picture:
        strips.draw(options.picture, picture(options.setups[0], options.object), 64)
        return
    pending = [(task, setup) for task in options.tasks for setup in options.setups or SETUPS[task]]
    if options.missing:
        pending = [(task, setup) for task, setup in pending if setup not in result["rows"].get(task, {})]
    measure_rows(measure, pending, result, options.out, images=IMAGES, seed=SEED)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that measure
    main()
