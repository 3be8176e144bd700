"""Time, memory and error of the closed-form passes at the size of Stable Diffusion 1.4, beside naive implementations.

    python tests/benchmarks/closed_form_scale.py        writes tests/benchmarks/results/closed_form_scale.json
    ... --rows uce:1,rece:1 --threads 1 --whole         some rows; one thread; no row of the naive ones scaled up
    ... --family sdxl                                   closed_form_scale_sdxl.json: 140 matrices, text states 2048 wide

The 32 K and V matrices of SD 1.4 in their exact shapes, random, and synthetic token states as CLIP's are: a common
mean, a decaying spectrum, rows of norm 28. Rows of the table: uce with 1 to 1000 concepts, one row each and as many
keeps; rece with one concept of 77 rows and one epoch; mace with 30 prompts of 77 rows a concept, refinement and fusion;
trce.remap with 60 prompts and a prior, lambda 0; speed with 1 to 1000 concepts, one row each, and 2000 kept rows, rho 1
and keys and values. lambda and weights are the references'.

"ours" is the pass's own code from the stored sums of its concepts to 32 new matrices, solve and merge: what the goals
are about. "whole" is all that a build does from token states on: the sums too (for rece, that of W^T W), rank reduction
and statistics. Each has its error and its ratio to the naive ones, which start from token states. They work as the
references do, once in float32 and once in float64, the truth: per layer, targets projected one by one, outer products
materialised and accumulated one by one (mace: one of all prompts for each of 77 places), an explicit inverse. What the
references compute and throw away (copies of all weights, the other 31 projections, rows of weight 0) is left out, as
are caches and the training of mace's own edits, so the ratios are rather low. One process, the same number of threads;
ours is the best of a few runs. Errors are |W' - W'64| / |W'64 - W|, Frobenius, over all sites together and of the worst
one. Peak memory is the rise of the process's resident peak (VmHWM, reset before each run), new matrices included.
Unless --whole, the longest naive rows run on --sites matrices of each shape and their times are scaled up, which the
JSON marks as extrapolated: memory is then that of a part, and errors are over those sites.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import machine
import torch
from naive import OWN, context, edited, mace_edited, normal_equation, null_space_edited, rece_edited, states
from random_models import random_shapes
from torch import Tensor

from erasec import registry
from erasec.closed_form import solver
from erasec.closed_form.base import ClosedForm, pack_system, unpack_system
from erasec.closed_form.solver import Solution, System
from erasec.family import FAMILIES, Site, sites
from erasec.model.edit import Remap, merge

RESULT = Path(__file__).parent / "results" / "closed_form_scale.json"
GOALS = {"uce:1": 30.0, "uce:100": 100.0, "uce:1000": 300.0}
MAX_ERROR = 1e-6
ROWS = {
    "sd1": (
        *("uce:1", "uce:10", "uce:100", "uce:1000", "rece:1", "mace:1", "mace:2", "trce.remap:60"),
        *("speed:1", "speed:10", "speed:100", "speed:1000"),
    ),
    "sdxl": ("uce:1", "uce:10"),
}
LONG = ("uce:1000",)
TOKENS, PROMPTS = 77, 30
KEPT, HOLD = 2000, 1e-4  # of speed
PRIOR_ROWS, PRIOR_WEIGHT, EOT_WEIGHT = 4096, 7.7e-3, 72.0

T = TypeVar("T")
Sums = dict[str, dict[str, Tensor]]


def matrices(size: str = "full", seed: int = 0, family: str = "sd1") -> dict[Site, Tensor]:
    """Random K and V of Stable Diffusion 1, float32 (d_out, d_in), by site."""
    draw = torch.Generator().manual_seed(seed)
    every = sites(FAMILIES[family], random_shapes(family, size)["unet"])
    chosen = (site for site in every if site.attn == "cross" and site.proj in ("k", "v"))
    return {site: torch.randn(site.shape, generator=draw) * site.shape[1] ** -0.5 for site in chosen}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``sums`` computes the pass's sums from token states and from ``shared``, the sums of the
    weights; ``naive`` gets the weights in the precision to work in and returns the run that is timed."""

    method: ClosedForm
    sums: Callable[[Mapping[str, Tensor]], Sums]
    naive: Callable[[Sequence[Tensor]], Callable[[], list[Tensor]]]


def options(name: str, **chosen: float | str) -> ClosedForm:
    kind = registry.load_pass(name)
    assert issubclass(kind, ClosedForm)
    return kind(relative=False, **chosen)  # type: ignore[arg-type]


def one_system(source: Tensor, target: Tensor, scale: float, keep: Tensor, keep_scale: float = 1.0) -> System:
    weight, kept = torch.full((len(source),), scale), torch.full((len(keep),), keep_scale)
    return solver.weighted_system(source, target, weight, keep, kept).compact()


def uce(count: int, width: int) -> Case:
    lam = 0.5
    source, target, keep = (states(count, width, seed).split(1) for seed in (1, 2, 3))

    def sums(shared: Mapping[str, Tensor]) -> Sums:
        rows = enumerate(zip(source, target, keep, strict=True))
        systems = {f"{number:04}": one_system(c, v, 1.0, k) for number, (c, v, k) in rows}
        return {"": dict(shared)} | {name: pack_system(system, "context") for name, system in systems.items()}

    def naive(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        kind = weights[0].dtype
        prompts = [(c.to(kind), v.to(kind), 1.0) for c, v in zip(source + keep, target + keep, strict=True)]
        return lambda: [edited(weight, prompts, lam) for weight in weights]

    return Case(options("uce", ridge=lam), sums, naive)


def rece(count: int, width: int) -> Case:
    lam, weight = 0.1, 0.1
    if count != 1:
        raise SystemExit("rece is measured with one concept")
    source, target, keep = (states(TOKENS, width, seed) for seed in (1, 2, 3))

    def sums(shared: Mapping[str, Tensor]) -> Sums:
        return {"": dict(shared), "one": pack_system(one_system(source, target, 1.0, keep, weight), "context")}

    def naive(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        c, v, k = (rows.to(weights[0].dtype)[:, None] for rows in (source, target, keep))
        return lambda: rece_edited(weights, c, v, (k, k, weight), lam)

    return Case(options("rece", ridge=lam, derive=lam, epochs=1, keep=1.0), sums, naive)


def mace(count: int, width: int) -> Case:
    lam = 10.0
    every = states(2 * count * TOKENS * PROMPTS, width, 1).reshape(count, 2, TOKENS, PROMPTS, width)
    concepts = [(pair[0], pair[1]) for pair in every]
    keep = states(TOKENS, width, 3)
    method = options("mace", ridge=lam)

    def sums(shared: Mapping[str, Tensor]) -> Sums:
        packed = {"": dict(shared)}
        for number, (source, target) in enumerate(concepts):
            words = source[OWN[0] : OWN[1]].flatten(0, 1)
            goals = target[OWN[1] - 1].repeat(OWN[1] - OWN[0], 1)
            refine = one_system(context(source).flatten(0, 1), context(target).flatten(0, 1), 1.0, keep)
            own = one_system(words, goals, 1.0, source.flatten(0, 1))
            packed[f"{number}"] = pack_system(refine, "context") | pack_system(own, "context.own")
        return packed

    def naive(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        kind, packed = weights[0].dtype, sums({})
        kept = torch.cat([unpack_system(packed[f"{number}"], "context").keep for number in range(count)])
        own = []
        for number in range(count):
            system = unpack_system(packed[f"{number}"], "context.own")
            alone = solver.solve(System(system.source, system.shift, kept), lam, relative=False)
            own.append(Solution(alone.left.to(kind), alone.right.to(kind), lam, alone.condition))
        given, same = [(source.to(kind), target.to(kind)) for source, target in concepts], keep.to(kind)[:, None]
        # Each concept brings the same kept prompt.
        return lambda: mace_edited(weights, given, own, (same, same, float(count)), lam)

    return Case(method, sums, naive)


def trce(count: int, width: int) -> Case:
    source, target = states(count, width, 1), states(count, width, 2)
    prior = solver.gram(states(PRIOR_ROWS, width, 3)) * (PRIOR_WEIGHT / PRIOR_ROWS)
    stored, scale = solver.gram_root(prior), EOT_WEIGHT / count

    def sums(shared: Mapping[str, Tensor]) -> Sums:
        system = one_system(source, target, scale, source[:0])
        return {"": {**shared, "context.prior": stored}, "one": pack_system(system, "context")}

    def naive(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        kind = weights[0].dtype
        cached = [((weight.double() @ prior).to(kind), prior.to(kind)) for weight in weights]
        pairs = list(zip(source.to(kind).split(1), target.to(kind).split(1), strict=True))

        def run() -> list[Tensor]:
            return [
                normal_equation(weight, [(c, v @ weight.T, scale) for c, v in pairs], 0.0, both)
                for weight, both in zip(weights, cached, strict=True)
            ]

        return run

    return Case(options("trce.remap", ridge=0.0), sums, naive)


def speed(count: int, width: int) -> Case:
    rho = 1.0
    kept = KEPT if width > 100 else width // 2  # in the small size of tests, they would hold every direction
    source, target, keep = (states(rows, width, seed) for seed, rows in ((1, count), (2, count), (3, kept)))

    def sums(shared: Mapping[str, Tensor]) -> Sums:
        return {"": dict(shared), "one": pack_system(one_system(source, target, 1.0, keep), "context")}

    def naive(weights: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        c, v, k = (rows.to(weights[0].dtype) for rows in (source, target, keep))
        return lambda: [null_space_edited(weight, c, v, k, rho, HOLD) for weight in weights]

    return Case(options("speed", ridge=rho, hold=HOLD, matrices="kv"), sums, naive)


CASES = {"speed": speed, "uce": uce, "rece": rece, "mace": mace, "trce.remap": trce}


def measured(run: Callable[[], T], repeat: int = 1) -> tuple[dict[str, Any], T]:
    """The best of some runs, wall and CPU seconds, and the first one's rise of the resident peak; the last result."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before: float | None = machine.status("VmRSS")
    except OSError:
        before = None  # a kernel that cannot reset the peak
    times, result, rise = [], None, None
    for number in range(repeat):
        result = None
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
        if number == 0 and before is not None:
            rise = round(machine.status("VmHWM") - before, 1)
    assert result is not None
    return {"seconds": min(t[0] for t in times), "cpu": min(t[1] for t in times), "peak_mb": rise}, result


def error(new: Mapping[Site, Tensor], true: Mapping[Site, Tensor], old: Mapping[Site, Tensor]) -> dict[str, Any]:
    """|W' - W'64| / |W'64 - W| over all sites of ``true``, and of the worst one."""
    off = {site: float((new[site].double() - truth).pow(2).sum()) for site, truth in true.items()}
    edit = {site: float((truth - old[site].double()).pow(2).sum()) for site, truth in true.items()}
    worst = max(true, key=lambda site: off[site] / edit[site])
    return {
        "error": (sum(off.values()) / sum(edit.values())) ** 0.5,
        "worst_error": (off[worst] / edit[worst]) ** 0.5,
        "worst_site": worst.label,
    }


def run_naive(case: Case, weights: Mapping[Site, Tensor], kind: torch.dtype, some: int) -> tuple[dict[str, Any], Any]:
    """The naive edit of all sites at once; or, where ``some`` is not 0, of as many of each shape, scaled up."""
    groups = {shape: [site for site in weights if site.shape == shape] for shape in {site.shape for site in weights}}
    total = {"seconds": 0.0, "cpu": 0.0}
    peaks = []
    edited: dict[Site, Tensor] = {}
    for group in groups.values() if some else [list(weights)]:
        chosen = group[: some or None]
        figures, new = measured(case.naive([weights[site].to(kind) for site in chosen]))
        total = {key: value + figures[key] * len(group) / len(chosen) for key, value in total.items()}
        peaks.append(figures["peak_mb"])
        edited |= dict(zip(chosen, new, strict=True))
    peak = None if None in peaks else max(peaks)
    return total | {"peak_mb": peak, "sites": len(edited), "extrapolated": len(edited) < len(weights)}, edited


def run_ours(
    case: Case, weights: Mapping[Site, Tensor], repeat: int
) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """The pass from its sums to new matrices, with the seconds of all parts; and from token states as in a build."""
    streams = {"context": tuple(weights)}
    view: Any = SimpleNamespace(streams=streams, weight=weights.__getitem__)
    method = case.method

    def prepare() -> Sums:
        return case.sums(method.shared_sums(view))

    def joined_system(sums: Sums) -> System:
        one = solver.combine_systems(unpack_system(sums[name], "context") for name in sorted(sums) if name)
        prior = sums[""].get("context.prior", one.keep[:0])
        return System(one.source, one.shift, torch.cat([one.keep, prior]), one.lost)

    def solve(sums: Sums) -> Solution:
        return method.solve_system(joined_system(sums), "context", sums)

    def merged(deltas: Mapping[Site, Any]) -> dict[Site, Tensor]:
        return {site: merge(weight, [deltas[site]]) for site, weight in weights.items()}

    def remapped(solution: Solution) -> dict[Site, Tensor]:
        return merged(dict.fromkeys(weights, Remap(solution.left, solution.right)))

    prepared, sums = measured(prepare, repeat)
    ours, new = measured(lambda: remapped(solve(sums)), repeat)
    whole, shipped = measured(lambda: merged(method.edit_from_sums(streams, prepare(), "").deltas), repeat)
    solved, solution = measured(lambda: solve(sums), repeat)
    applied, _ = measured(lambda: remapped(solution), repeat)
    reduced, factors = measured(lambda: solver.reduce_rank(solution.left, solution.right), repeat)
    rows, final = joined_system(sums), Solution(*factors, solution.ridge, solution.condition)
    figures, stats = measured(lambda: solver.stats(rows, final), repeat)
    parts = {"sums": prepared, "solve": solved, "merge": applied, "reduced": reduced, "stats": figures}
    ours["parts"] = {name: part["seconds"] for name, part in parts.items()}
    return ours | {"stats": stats}, whole, new, shipped


def measure(name: str, weights: Mapping[Site, Tensor], some: int, repeat: int = 5) -> dict[str, Any]:
    """One row of the table; ``some`` as in ``run_naive``."""
    kind, count = name.split(":")
    case = CASES[kind](int(count), next(iter(weights)).shape[1])
    ours, whole, new, shipped = run_ours(case, weights, repeat)
    naive32, new32 = run_naive(case, weights, torch.float32, some)
    naive64, true = run_naive(case, weights, torch.float64, some)
    ours |= error(new, true, weights)
    whole |= error(shipped, true, weights)
    naive32 |= error(new32, true, weights)
    for part in (ours, whole):
        part["ratio32"], part["ratio64"] = (other["seconds"] / part["seconds"] for other in (naive32, naive64))
    row = {"ours": ours, "whole": whole, "naive32": naive32, "naive64": naive64}
    over = [f"{part} error" for part in ("ours", "whole") if not row[part]["error"] <= MAX_ERROR]
    over += ["ratio"] if ours["ratio32"] < GOALS.get(name, 0.0) else []
    return row | {"goal_ratio": GOALS.get(name), "goal_error": MAX_ERROR, "over": over}


def line(name: str, row: Mapping[str, Any]) -> str:
    ours, whole, naive32, naive64 = (row[part] for part in ("ours", "whole", "naive32", "naive64"))
    mark = "~" if naive32["extrapolated"] else ""
    memory = " / ".join(
        "-" if part["peak_mb"] is None else f"{part['peak_mb']:.0f}" for part in (ours, naive32, naive64)
    )
    goal = f" (≥ {row['goal_ratio']:.0f})" if row["goal_ratio"] else ""
    cells = (
        name,
        f"{ours['seconds']:.3f} / {whole['seconds']:.3f}",
        f"{mark}{naive32['seconds']:.2f}",
        f"{mark}{naive64['seconds']:.2f}",
        f"{ours['ratio32']:.0f}{goal} / {whole['ratio32']:.0f}",
        f"{ours['ratio64']:.0f} / {whole['ratio64']:.0f}",
        memory,
        f"{ours['error']:.1e} / {whole['error']:.1e}",
        f"{naive32['error']:.1e}",
        f"OVER: {', '.join(row['over'])}" if row["over"] else "",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(ROWS), default="sd1")
    parser.add_argument("--rows", help="such as uce:1,uce:10: pass and number of concepts (default: all of the family)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--whole", action="store_true", help="scale no naive row up; many minutes")
    parser.add_argument("--sites", type=int, default=1, help="matrices of each shape in rows that are scaled up")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, help="JSON to write (default: RESULT when everything is measured)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    names = chosen.rows.split(",") if chosen.rows else list(ROWS[chosen.family])
    weights = matrices(chosen.size, family=chosen.family)
    print(
        "| row | ours / whole, s | naive 32, s | naive 64, s | ratio to 32 | to 64 | peak MB: ours / 32 / 64 "
        "| error: ours / whole | naive 32 | goals missed |\n|" + "---|" * 10
    )
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = measure(name, weights, 0 if chosen.whole or name not in LONG else chosen.sites)
        print(line(name, rows[name]), flush=True)
    result = {
        "rows": rows,
        "family": chosen.family,
        "size": chosen.size,
        "threads": torch.get_num_threads(),
        "machine": machine.about(),
    }
    shipped = RESULT if chosen.family == "sd1" else RESULT.with_stem(f"{RESULT.stem}_{chosen.family}")
    out = chosen.out or (shipped if names == list(ROWS[chosen.family]) and chosen.size == "full" else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
