"""Run a plan: solve, merge, export, validate, report. The only place where outputs appear, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from erasec import recipe as recipes
from erasec import report as reports
from erasec import validate
from erasec.base import Check, EditTarget
from erasec.checkpoint import file_digest
from erasec.errors import CheckFailed
from erasec.folder import Folder
from erasec.judge import Sampling
from erasec.single_file import SingleFile
from erasec.staging import put, staged

if TYPE_CHECKING:
    from erasec.model import Model
    from erasec.plan import Plan
    from erasec.report import Report

REJECTED = ".rejected"
PACKAGES = ("erasec", "torch", "diffusers", "transformers", "onnx", "onnxruntime")


def run(plan: Plan) -> Report:
    """Build ``plan.out``. Raises CheckFailed, with everything in ``plan.out/.rejected``, where a check failed."""
    with staged(plan.out) as stage:
        report = _build(plan, stage)
        if not report.passed:
            rejected = plan.out / REJECTED
            plan.out.mkdir(parents=True, exist_ok=True)
            put(stage, rejected)
            failed = [check for check in report.checks if not check.passed]
            lines = "; ".join(f"{check.name} is {check.value:.4g}, the limit {check.limit:.4g}" for check in failed)
            raise CheckFailed(
                f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(check.name for check in failed)}",
                why=lines, where=str(rejected),
                fix="look at report.html there; then change the pass options, the concept's keep phrases, or a limit",
            )  # fmt: skip
        put(stage, plan.out)
        return report


def _build(plan: Plan, stage: Path) -> Report:
    from erasec.progress import bar

    seconds: dict[str, float] = {}
    model, applied = plan.model, []
    with bar("solve", len(plan.concepts) * len(plan.passes)) as advance:
        for step in plan.passes:
            start = time.perf_counter()
            for edit in step.solve_all(model, plan.concepts, plan.context):
                model = model.with_edit(edit)
                took, start = time.perf_counter() - start, time.perf_counter()
                applied.append(
                    reports.Applied(
                        step.name, step.version, step.paper, edit.concept, dict(edit.params), dict(edit.stats), took
                    )
                )
                advance(edit.concept.count(", ") + 1)
    model.forget_texts()
    seconds["solve"] = sum(item.seconds for item in applied)

    with _timed(seconds, "merge and write"):
        model.source.write(stage / "hf", model.merged(), plan.recipe.link)
    built = Folder(stage / "hf", plan.model.source.variant)

    checks: list[Check] = []
    for target in plan.targets:
        with _timed(seconds, f"export {target.name}"):
            if isinstance(target, EditTarget):
                checks += target.export(model, stage / target.name, plan.context).checks
            else:
                checks += target.export(built, stage / target.name, plan.context).checks

    notes = list(plan.model.source.notes) if isinstance(plan.model.source, SingleFile) else []
    limits, evidence = plan.recipe.checks, None
    judge = validate.judge_of(plan.model)
    if judge is not None:
        with _timed(seconds, "pictures and judge"):
            sampling = Sampling(limits.steps, limits.guidance, plan.context.device)
            evidence = validate.gather(
                judge, plan.concepts, plan.model.source.root, built.root, limits.images, plan.context.seed, sampling
            )
    if judge is not None and evidence is not None:
        scheduler = built.config("scheduler", "scheduler_config.json")["_class_name"]
        checks += validate.checks(evidence, judge, limits, plan.context.seed, scheduler)
    unseen = [c.name for c in plan.concepts if judge is None or all(q.group == "keep" for q in judge.panel(c, 1, 0))]
    if unseen:
        notes.append(
            f"No judge can see {', '.join(unseen)} in this model's pictures: that it is gone was not measured."
            + ("" if evidence else " The checks below say only that the files are sound.")
        )
    if variants := sorted({built.variant_of(component) for component in plan.model.family.components} - {""}):
        notes.append(
            f'The folder hf has its weights as the variant {variants[0]}: load it with variant="{variants[0]}".'
        )
    if left := plan.model.source.doubles(model.merged()):
        notes.append(
            f"Left out of the plain checkpoint, as unedited copies of edited weights: {', '.join(map(str, left))}."
        )

    with _timed(seconds, "report"):
        (stage / "recipe.toml").write_text(recipes.to_toml(plan.recipe), encoding="utf-8")
        moves = _moves(model)
    report = reports.Report(
        model={"name": model.name, "revision": model.revision, "family": model.family.name, "digest": model.digest},
        concepts=tuple(concept.model_dump(mode="json") for concept in plan.concepts),
        applied=tuple(applied),
        moves=moves,
        checks=tuple(checks),
        pairs=_pairs(evidence),
        rates=() if evidence is None else tuple(
            row for group in (*validate.ERASED_GROUPS, "keep") for row in validate.rates(evidence, group)
        ),
        written=tuple(_written(target.name, stage / target.name) for target in plan.targets),
        seconds=seconds,
        environment=_environment(),
        notes=tuple(notes),
        passed=all(check.passed for check in checks),
    )  # fmt: skip
    reports.write(report, stage)
    return report


def _moves(model: Model) -> tuple[reports.SiteMove, ...]:
    """How far every edited site moved, relative to its stored weight."""
    found = []
    for site in model.sites:
        deltas = model.deltas(site)
        if deltas:
            stored = model.stored(site).double()
            relative = float((model.weight(site) - stored).norm() / stored.norm())
            rank = min(sum(delta.rank for delta in deltas), *site.shape)
            found.append(reports.SiteMove(site.key, site.block, site.attn, site.proj, site.shape, relative, rank))
    return tuple(found)


def _pairs(evidence: validate.Evidence | None) -> tuple[reports.Pair, ...]:
    if evidence is None:
        return ()
    return tuple(
        reports.Pair(
            question.group, question.prompt, question.seed, evidence.before[row], evidence.after[row],
            question.looked_for, bool(evidence.shown_before[row]), bool(evidence.shown_after[row]),
        )
        for row, question in enumerate(evidence.questions)
    )  # fmt: skip


def _written(target: str, folder: Path) -> reports.Written:
    files = Folder(folder).files()
    return reports.Written(
        target,
        target,
        {name.as_posix(): ((folder / name).stat().st_size, file_digest(folder / name)) for name in files},
    )


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
