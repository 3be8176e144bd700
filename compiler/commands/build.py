"""Run a plan: solve, merge, export, validate, report. The only place where outputs appear, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from erasec.base import Check, EditTarget, Origin, file_name
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import content_digest
from erasec.checkpoint.staging import put, staged
from erasec.errors import CheckFailed, ErasecError
from erasec.judging import validate
from erasec.judging.judge import Sampling
from erasec.keys import absorb
from erasec.keys import key_file as secret
from erasec.ldm.single_file import SingleFile
from erasec.model import sidecar as extras
from erasec.model.sidecar import Extras
from erasec.recipe import recipe as recipes
from erasec.reporting import collect as facts
from erasec.reporting import report as reports

if TYPE_CHECKING:
    from erasec.base import Pass
    from erasec.commands.plan import Plan
    from erasec.judging.judge import Judge
    from erasec.judging.validate import Evidence
    from erasec.model.edit import Secret
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.reporting.report import Report

REJECTED = ".rejected"
PUBLIC = ".public"


@dataclass(frozen=True)
class _Solved:
    """The model with all its edits, what each was, and the secrets, each with its concept and the pass that made it."""

    model: Model
    applied: tuple[reports.Applied, ...]
    secrets: tuple[tuple[Pass, Concept, Secret], ...]


def is_main() -> bool:
    """Whether this process is the one that writes and speaks; the others of ``accelerate launch`` only train along."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def assist(plan: Plan) -> None:
    """What a process beside the main one does: solve as that one does, so that they train together; write nothing."""
    _solve(plan, _work(plan.out))


def run(plan: Plan) -> Report:
    """Build ``plan.out``. Raises CheckFailed, with everything in ``plan.out/.rejected``, where a check failed.

    Long training keeps its state in a hidden folder beside ``plan.out`` until the build is done: run again, it resumes.
    """
    with _resumable(plan.out) as work, staged(plan.out) as stage:
        report = _build(plan, stage, work)
        if not report.passed:
            rejected = plan.out / REJECTED
            plan.out.mkdir(parents=True, exist_ok=True)
            put(stage, rejected)
            failed = [check for check in report.checks if not check.passed]
            lines = "; ".join(f"{check.name} is {check.value:.4g}, the limit {check.limit:.4g}" for check in failed)
            raise CheckFailed(
                f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(check.name for check in failed)}",
                why=lines, where=str(rejected),
                fix="look at report.html there; then change the pass options, the concept's keep phrases, or a limit"
                + (f"; what was trained is kept in {work}, for another limit" if any(work.iterdir()) else ""),
            )  # fmt: skip
        put(stage, plan.out)
        return report


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.training")


@contextmanager
def _resumable(out: Path) -> Iterator[Path]:
    """Where training keeps its state. It goes after success, and in any case where nothing was put there."""
    work = _work(out)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)  # a key in training is as secret as one that is trained
    try:
        yield work
        shutil.rmtree(work)
    except KeyboardInterrupt as stop:
        if not any(work.iterdir()):
            raise
        raise ErasecError(
            "stopped while training", why="what was trained so far is kept", where=str(work),
            fix="give the same command again, which goes on from there; or delete that folder",
        ) from stop  # fmt: skip
    finally:
        with suppress(OSError):
            work.rmdir()


def _solve(plan: Plan, work: Path) -> _Solved:
    from erasec.progress import bar

    asked = {concept.name: concept for concept in plan.concepts}
    context = replace(plan.context, work=work)
    model, applied, secrets = plan.model, [], []
    with bar("solve", len(plan.concepts) * len(plan.passes)) as advance:
        for step in plan.passes:
            start = time.perf_counter()
            for edit in step.solve_all(model, plan.concepts, context):
                model = model.with_edit(edit)
                took, start = time.perf_counter() - start, time.perf_counter()
                curves = {name: list(values) for name, values in edit.curves.items()}
                applied.append(reports.Applied(
                    step.name, step.version, step.paper, edit.concept, dict(edit.params), dict(edit.stats), took,
                    step.limits, curves,
                ))  # fmt: skip
                if edit.secret is not None:
                    if edit.secret.concept not in asked:
                        why = f"it was asked for {', '.join(asked)}"
                        raise ErasecError(f"pass {step.name} gave a secret of {edit.secret.concept!r}", why)
                    secrets.append((step, asked[edit.secret.concept], edit.secret))
                advance(edit.concept.count(", ") + 1)
    for view in (plan.model, model):  # two where the text encoder was edited
        view.forget_texts()
    return _Solved(model, tuple(applied), tuple(secrets))


def _build(plan: Plan, stage: Path, work: Path) -> Report:
    seconds: dict[str, float] = {}
    solved = _solve(plan, work)
    model = solved.model
    seconds["solve"] = sum(item.seconds for item in solved.applied)

    checks: list[Check] = []
    built = Folder(stage / plan.targets[0].name, plan.model.source.variant)
    public = replace(built, root=stage / PUBLIC) if plan.keys else built
    carried = extras.gathered(model.edits, extras.read(plan.model.source.root))
    with _timed(seconds, "merge and write"):
        model.source.write(public.root, model.merged(), plan.recipe.link)
        extras.write(public.root, carried)
        if plan.keys:
            checks += _unlock(plan, model, public, built, carried)
        else:
            _write_keys(solved, built, stage)

    context = replace(plan.context, origin=None if plan.keys else _origin(model))
    for target in plan.targets:
        with _timed(seconds, f"export {target.name}"):
            if isinstance(target, EditTarget):
                made = target.export(model, stage / target.name, context).checks
            else:
                made = target.export(built, stage / target.name, context).checks
            taken = {check.name for check in checks}  # several targets compare weights and outputs
            checks += [
                replace(check, name=f"{target.name}/{check.name}") if check.name in taken else check for check in made
            ]

    judge = validate.judge_of(plan.model)
    evidence: list[Evidence] = []
    if judge is not None:
        with _timed(seconds, "pictures and judge"):
            evidence, measured = _measured(plan, judge, solved, public, built, carried)
        checks += measured
    if judge is not None and evidence:
        with _timed(seconds, "pictures of what was written"):
            checks += _deployed(plan, judge, evidence[0], stage)
    shutil.rmtree(stage / PUBLIC, ignore_errors=True)

    with _timed(seconds, "report"):
        (stage / "recipe.toml").write_text(recipes.to_toml(plan.recipe), encoding="utf-8")
        moves = facts.moves(model)
    opened = {key.concept.name for key in plan.keys}
    groups = (*validate.ERASED_GROUPS, "keyed", "keep")
    report = reports.Report(
        model={"name": model.name, "revision": model.revision, "family": model.family.name, "digest": model.digest},
        concepts=tuple(concept.model_dump(mode="json") for concept in plan.concepts if concept.name not in opened),
        applied=solved.applied,
        moves=moves,
        checks=tuple(checks),
        pairs=tuple(pair for each in evidence for pair in facts.pairs(each)),
        rates=tuple(row for each in evidence for group in groups for row in validate.rates(each, group)),
        written=tuple(facts.written(target.name, stage / target.name) for target in plan.targets),
        seconds=seconds,
        environment=facts.environment(),
        notes=tuple(_notes(plan, solved, built, judge, bool(evidence))),
        passed=all(check.passed for check in checks),
        extras=facts.carried(built, [key.concept.name for key in plan.keys]),
    )
    reports.write(report, stage)
    return report


def _origin(model: Model) -> Origin:
    """What the merged checkpoint is a variant of."""
    sites = [site for site in model.parameters if model.deltas(site)]
    digests = {component: model.component_digest(component) for component in model.family.components}
    return Origin(digests, {f"{site.component}/{site.key}": model.site_digest(site) for site in sites})


def _unlock(plan: Plan, model: Model, public: Folder, built: Folder, carried: Extras) -> tuple[Check, ...]:
    """Write ``built``: the public folder with the keys attached, or absorbed into its weights, which is a check.

    Raises ErasecError for the key of another model.
    """
    denoiser, limit = plan.model.family.denoiser, plan.recipe.absorb
    entries = public.entries(denoiser)
    digest = content_digest(entries)
    for key in plan.keys:
        secret.check_bound(key, digest)
    memories = tuple(memory for key in plan.keys for memory in secret.folded(key.secret, entries))
    if not limit:
        public.write(built.root, {}, link=True)
        extras.write(built.root, replace(carried, memories=(*carried.memories, *memories)))
        return ()
    concepts = [key.concept for key in plan.keys]
    changed, check = absorb.absorbed(memories, concepts, model, entries, plan.context, limit)
    public.write(built.root, {denoiser: changed}, link=True)
    extras.write(built.root, carried)
    return (check,)


def _write_keys(solved: _Solved, built: Folder, stage: Path) -> None:
    """Write each secret beside the folders, never into one."""
    if not solved.secrets:
        return
    bound = content_digest(built.entries(solved.model.family.denoiser))
    for step, concept, held in solved.secrets:
        path = stage / f"{_key_name(concept)}{secret.SUFFIX}"
        if path.exists():
            raise ErasecError(f"two keys would be named {path.name}", fix="give one of the concepts another name")
        secret.write(path, held, concept, step.name, step.version, bound)


def _key_name(concept: Concept) -> str:
    return file_name([concept.name]) or "concept"


def _measured(
    plan: Plan, judge: Judge, solved: _Solved, public: Folder, built: Folder, carried: Extras
) -> tuple[list[Evidence], list[Check]]:
    """What the judge saw, and the checks on it; both empty where there is nothing to ask."""
    limits, seed = plan.recipe.checks, plan.context.seed
    sampling = Sampling(limits.steps, limits.guidance, plan.context.device)
    scheduler = built.config("scheduler", "scheduler_config.json")["_class_name"]
    opened = [key.concept for key in plan.keys]
    evidence = validate.gather(
        judge, opened or plan.concepts, public.root if opened else plan.model.source.root, built.root, limits.images,
        seed, sampling, keyed=bool(opened),
    )  # fmt: skip
    if evidence is None:
        return [], []
    every, checks = [evidence], list(validate.checks(evidence, judge, limits, seed, scheduler))
    for concept in opened:
        checks += validate.recovered(judge, concept, evidence, None, limits, seed, scheduler)
    for _, concept, held in () if opened else solved.secrets:
        memories = secret.folded(held, built.entries(plan.model.family.denoiser))
        with _carrying(built, replace(carried, memories=(*carried.memories, *memories))) as keyed:
            shown = validate.with_key(judge, concept, evidence, keyed, sampling)
        if shown is not None:
            every.append(shown)
            checks += validate.recovered(judge, concept, shown, evidence, limits, seed, scheduler)
    return every, checks


def _deployed(plan: Plan, judge: Judge, evidence: Evidence, stage: Path) -> Iterator[Check]:
    """What the judge saw in pictures that the artifacts made themselves."""
    for target in plan.targets:
        if target.name in validate.RUN_BY:
            folder = stage / target.name
            stored = {getattr(target, option, "fp32") for option in ("precision", "vae", "weights")}
            precision = next(kind for kind in validate.ALIKE if kind in stored)  # of several, the coarsest
            scheduler = Folder(folder).config("scheduler", "scheduler_config.json")["_class_name"]
            yield from validate.deployed(
                judge, evidence, folder, target.name, precision, plan.recipe.checks, plan.context.seed, scheduler
            )


@contextmanager
def _carrying(folder: Folder, carried: Extras) -> Iterator[Path]:
    """A copy of a folder, by hard links, that carries other extras; gone when the block ends."""
    with TemporaryDirectory(prefix=".keyed-", dir=folder.root.parent) as scratch:
        root = Path(scratch) / "model"
        folder.write(root, {}, link=True)
        extras.write(root, carried)
        yield root


def _notes(plan: Plan, solved: _Solved, built: Folder, judge: Judge | None, measured: bool) -> Iterator[str]:
    """Sentences that a reader must know."""
    source, name = plan.model.source, built.root.name
    if isinstance(source, SingleFile):
        yield from source.notes
    concepts = [key.concept for key in plan.keys] or plan.concepts
    if unseen := [c.name for c in concepts if judge is None or not validate.labels(judge, c)]:
        what = "the key brings it back" if plan.keys else "it is gone"
        yield f"No judge can see {', '.join(unseen)} in this model's pictures: that {what} was not measured." + (
            "" if measured else " The checks below say only that the files are sound."
        )
    if plan.keys:
        names = ", ".join(concept.name for concept in concepts)
        yield f"This build is opened by a key, and shows {names} again: what it holds is as secret as the key."
    elif solved.secrets:
        names = ", ".join(f"{_key_name(concept)}{secret.SUFFIX}" for _, concept, _ in solved.secrets)
        yield (
            f"{names}: whoever has such a key can bring its concept back, so keep it apart from the folders that are "
            "given away. It is access control, not encryption: with the weights, another key can be searched for."
        )
    if extras.read(built.root):
        yield (
            f"The folder {name} is more than weights: load it with erasec.pipeline. Other loaders read its weights "
            "alone, and the model is then another one."
        )
    if variants := sorted({built.variant_of(component) for component in plan.model.family.components} - {""}):
        yield f'The folder {name} has its weights as the variant {variants[0]}: load it with variant="{variants[0]}".'
    if left := source.doubles(solved.model.merged()):
        yield f"Left out of the plain checkpoint, as unedited copies of edited weights: {', '.join(map(str, left))}."


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
