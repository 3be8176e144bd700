"""Runs a plan: solve, merge, export, check, report. The output folder is replaced as a whole, or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import Check, EditTarget
from erasec.checkpoint.disk import PRIVATE_FOLDER
from erasec.checkpoint.folder import Folder
from erasec.checkpoint.safetensors import FLOATS, content_digest, read_tensor
from erasec.checkpoint.staging import Output, file_name, output, training_folder
from erasec.commands import durations, estimates, pictures, release
from erasec.commands.audit import audit_build, check_auditable
from erasec.commands.current import inputs
from erasec.commands.effect import check_change, check_goals
from erasec.commands.measures import Measured, measure_files
from erasec.commands.output_paths import check_replaceable
from erasec.commands.solved import Solver
from erasec.errors import CheckFailed, ErasecError, is_out_of_memory, reason, words
from erasec.graphs.manifest import LinkContext, Origin
from erasec.judging import validate
from erasec.judging.evidence import rates
from erasec.keys import key_file
from erasec.keys.absorb import absorb_keys
from erasec.ldm.single_file import SingleFile
from erasec.model.edit import edit_digest
from erasec.model.sidecar import gather_extras, read_extras, write_extras
from erasec.model.threads import fixed_threads
from erasec.progress import bar
from erasec.recipe.recipe import code_files, to_toml
from erasec.reporting import collect
from erasec.reporting.report import EditRecord, Report
from erasec.training.base import Learned, TrainingContext

if TYPE_CHECKING:
    from erasec.base import Pass
    from erasec.commands.plan import Plan
    from erasec.model.memory import Secret
    from erasec.model.sidecar import Extras
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

BROKEN_FIX = "fetch the model again, or give another checkpoint: this one is damaged"
PUBLIC = ".public"  # the checkpoint without the keys, while a keyed build runs


@dataclass(frozen=True)
class _Solved:
    """The edited model, a record of each edit, each secret with the pass that made it and its concept, and the checks
    of the passes."""

    model: Model
    applied: tuple[EditRecord, ...]
    secrets: tuple[tuple[Pass, Concept, Secret], ...]
    checks: tuple[Check, ...]


@fixed_threads()
def train_in_worker(plan: Plan) -> None:
    """The part of a build that every process runs: solve the plan, so that the processes train together."""
    _solve(plan, training_folder(plan.out))


def run(plan: Plan, fresh: bool = False) -> Report:
    """Build ``plan.out`` and return its report. With ``fresh``, no edit is taken from the store.

    Raises CheckFailed if a check fails; the output is then in ``release.rejected_folder``. Raises ErasecError if
    another command writes ``plan.out``, or if the model or the content of ``plan.out`` has changed meanwhile. Long
    training keeps its state in a hidden folder next to ``plan.out`` until the build succeeds, and resumes from it when
    the build is run again.
    """
    if plan.recipe.audit:
        check_auditable(plan, plan.recipe.audit)
    total = estimates.output_bytes(plan.targets, plan.model)
    with (
        output(plan.out, total=total) as own,
        release.private_output(plan) as private,
        _resumable(own) as work,
    ):
        try:
            report = _build(plan, own.new_folder(), work, private.stage if private else None, fresh)
        except Exception as error:
            plan.model.check_unchanged()  # a change explains every other error
            if is_out_of_memory(error):
                raise _out_of_memory(plan, error) from error
            raise
        plan.model.check_unchanged()
        check_replaceable(plan.out)
        if report.outcome == "rejected":
            raise _rejection(plan, report, release.publish_rejected(plan, own), work)
        release.publish(plan, own, private)
        return report


def _out_of_memory(plan: Plan, error: Exception) -> ErasecError:
    """The error for a build for which the memory of its device, or of the machine, was not enough."""
    fix = "stop other programs, or use another --device"
    if learned := [step for step in plan.passes if isinstance(step, Learned)]:
        step = learned[0]
        fix = (
            "give less memory than there is, such as --memory 8GB: trainings then use smaller parts of a batch; or a "
            f"smaller batch: --pass {step.name}:batch={max(1, step.batch // 2)}; or " + fix
        )
    return ErasecError(f"the memory was not enough (device {plan.context.device})", why=reason(error), fix=fix)


def _rejection(plan: Plan, report: Report, rejected: Path, work: Path) -> CheckFailed:
    """The error for a build whose checks failed: it blames the base where the base is the cause."""
    failed = [check for check in report.checks if not check.passed]
    what = f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(check.name for check in failed)}"
    where = str(rejected)
    if broken := _broken_tensor(plan.model):
        return CheckFailed(what, f"{broken} of {plan.model.name} has a NaN or an infinity", BROKEN_FIX, where)
    names = {check.name for check in failed}
    erased_groups = [row for row in report.rates if f"erased/{row['group']}" in names]
    never = [row for row in erased_groups if not row["before"]]
    # Of many concepts, few pictures each, some show none by chance.
    if never and (len(never) == len(erased_groups) or len(plan.concepts) <= validate.POOLED):
        before = {label for concept in plan.earlier for label in (concept.name, concept.label)}
        label, images, group = never[0]["looked_for"], never[0]["images"], never[0]["group"]
        erased = "it was erased from this model before" if label in before else "without the edit"
        return CheckFailed(
            what,
            why=f"{plan.model.name} shows {label} in none of {images} pictures ({group} prompts), {erased}: there is "
            "nothing to erase, or nothing that the judge can measure",
            fix="check that this is the model you mean; leave out a concept that was erased before, or a phrase that "
            "the model does not know",
            where=where,
        )
    values = "; ".join(_explained(check, alone=len(failed) == 1) for check in failed)
    if names == {pictures.JUDGED}:
        return CheckFailed(what, values, "name a judge that can see it: --judge; or build without --gate", where)
    fix = "look at report.html there; then change the pass options, the concept's keep phrases, or a limit"
    if any(work.iterdir()):
        fix += f"; the trained state stays in {work} for a build with another limit"
    return CheckFailed(what, values, fix, where)


def _explained(check: Check, alone: bool) -> str:
    """Value, limit and explanation of a failed check; of several checks only the beginnings of the explanations."""
    how = check.how if alone else check.how.split("; ")[0]
    return f"{check.name} is {check.value:.4g}, the limit {check.limit:.4g}" + (f" ({how})" if how else "")


def _broken_tensor(model: Model) -> str:
    """The first tensor of the base with a NaN or an infinity, as "component/key"; "" if there is none.

    All weights are read for this, so it is for builds that failed.
    """
    for component in model.family.components:
        for key, entry in model.entries(component).items():
            if entry.dtype in FLOATS and not bool(read_tensor(entry).isfinite().all()):
                return f"{component}/{key}"
    return ""


@contextmanager
def _resumable(own: Output) -> Iterator[Path]:
    """The folder in which training keeps its state. It goes when the output is published, and when it is empty."""
    work = own.training
    work.mkdir(PRIVATE_FOLDER, exist_ok=True)  # it may hold a key, which only its owner may read
    try:
        yield work
    except KeyboardInterrupt as stop:
        if not any(work.iterdir()):
            raise
        raise ErasecError(
            "stopped while training",
            why="the training state was kept",
            where=str(work),
            fix="run the same command again to resume; or delete that folder",
        ) from stop


def _solve(plan: Plan, work: Path, fresh: bool = False) -> _Solved:
    concepts = {concept.name: concept for concept in plan.concepts}
    model, applied, secrets = plan.model, [], []
    checks: list[Check] = []
    if plan.passes:
        check_goals(plan.concepts, model)
    solver = Solver(plan.model, fresh)
    with bar("solve", len(plan.concepts) * len(plan.passes)) as advance:
        for step, origins, measures in zip(plan.passes, plan.origins, plan.measures, strict=True):
            context = TrainingContext(**vars(plan.context), resume_folder=work, measures=measures)
            start = time.perf_counter()
            for edit, stored in solver.solve(step, model, plan.concepts, context):
                edited = model.with_edit(edit)
                check_change(step, model, edited, edit)
                model = edited
                checks += step.checks(edit)
                seconds, start = time.perf_counter() - start, time.perf_counter()
                curves = {name: list(values) for name, values in edit.curves.items()}
                applied.append(
                    EditRecord(
                        step.name,
                        step.version,
                        step.paper,
                        edit.concepts,
                        dict(edit.params),
                        dict(edit.stats),
                        seconds,
                        step.limits,
                        curves,
                        dict(origins),
                        stored,
                        edit_digest(edit),
                    )
                )
                if edit.secret is not None:
                    if edit.secret.concept not in concepts:
                        why = f"the concepts of this build are {', '.join(concepts)}"
                        raise ErasecError(f"pass {step.name} returned a secret of {edit.secret.concept!r}", why)
                    secrets.append((step, concepts[edit.secret.concept], edit.secret))
                advance(len(edit.concepts))
    for view in (plan.model, model):  # an edit of a text encoder loads a second one
        view.release_text_encoders()
    return _Solved(model, tuple(applied), tuple(secrets), tuple(checks))


@fixed_threads()
def _build(plan: Plan, stage: Path, work: Path, private: Path | None, fresh: bool) -> Report:
    seconds: dict[str, float] = {}
    started, before = time.time(), inputs(plan)
    try:
        solved = _solve(plan, work, fresh)
    except (ErasecError, RuntimeError) as error:  # torch raises RuntimeError where a matrix has a NaN
        if broken := _broken_tensor(plan.model):
            raise ErasecError(
                f"{plan.model.name} cannot be edited", f"{broken} has a NaN or an infinity", BROKEN_FIX
            ) from error
        raise
    model = solved.model
    seconds["solve"] = sum(item.seconds for item in solved.applied)

    checks = list(solved.checks)
    built = Folder(stage / plan.targets[0].name, plan.model.source.variant)
    public = replace(built, root=stage / PUBLIC) if plan.keys else built
    extras = gather_extras(model.edits, read_extras(plan.model.source.root))
    absorbed: tuple[str, ...] = ()
    with _timed(seconds, "merge and write"):
        model.source.write(public.root, model.merged(), plan.recipe.link)
        write_extras(public.root, extras)
        if plan.keys:
            absorbed, unlocked = _unlock(plan, model, public, built, extras)
            checks += unlocked
        else:
            _write_keys(solved, built, stage)

    context = LinkContext(**vars(plan.context), origin=None if plan.keys else edit_origin(model))
    artifacts = []
    for target in plan.targets:
        with _timed(seconds, f"export {target.name}"):
            out = stage / target.name
            out.mkdir(exist_ok=True)
            if isinstance(target, EditTarget):
                artifact = target.export(model, out, context)
            else:
                artifact = target.export(built, out, context)
        artifacts.append(artifact)
        used = {check.name for check in checks}  # two targets may have checks of the same name
        checks += [
            replace(check, name=f"{target.name}/{check.name}") if check.name in used else check
            for check in artifact.checks
        ]

    secrets = [(concept, secret) for _, concept, secret in solved.secrets]
    with _timed(seconds, "pictures and judge") if plan.painting else nullcontext():
        looked = pictures.look(plan, secrets, public, built, extras)
    checks += looked.checks
    if looked.evidence and plan.judge is not None and plan.painting.judged:
        with _timed(seconds, "pictures of what was written"):
            checks += pictures.check_artifacts(plan, plan.judge, looked.evidence[0], built, artifacts)
    measured = Measured()
    if plan.files.pictures:
        with _timed(seconds, "prompt and caption files"):
            measured = measure_files(plan, public, built)
        checks += measured.checks
    checks += pictures.gate_checks(plan)
    audits: list[dict[str, Any]] = []
    if plan.recipe.audit:
        with _timed(seconds, "audit"):
            audits, gates = audit_build(plan, plan.recipe.audit, built)
        checks += gates
    shutil.rmtree(stage / PUBLIC, ignore_errors=True)
    # A rejected build is no release: all of it is kept together, for people who look for the reason.
    apart = private if all(check.passed for check in checks) else None
    undoing = release.set_apart(plan, stage, apart)

    with _timed(seconds, "report"):
        (stage / "recipe.toml").write_text(to_toml(plan.recipe), encoding="utf-8")
        moves = collect.site_moves(model)
        opened = {key.concept.name for key in plan.keys}
        reaches = collect.reaches(model, [concept for concept in plan.concepts if concept.name not in opened])
    groups = (*validate.ERASED_GROUPS, "keyed", "keep")
    report = Report(
        model={"name": model.name, "revision": model.revision, "family": model.family.name, "digest": model.digest},
        concepts=tuple(concept.model_dump(mode="json") for concept in plan.concepts if concept.name not in opened),
        applied=solved.applied,
        moves=moves,
        checks=tuple(checks),
        pairs=(*(pair for item in looked.evidence for pair in collect.picture_pairs(item)), *measured.pairs),
        rates=tuple(row for item in looked.evidence for group in groups for row in rates(item, group)),
        written=tuple(
            collect.written_files(target.name, stage / target.name)
            for target in plan.targets
            if (stage / target.name).is_dir()
        ),
        seconds=seconds,
        environment=collect.environment(),
        notes=(
            *_notes(plan, solved, built, looked),
            *release.notes(plan, undoing),
            *measured.notes,
            *_unaudited(plan),
        ),
        judged=tuple(concept.name for concept in plan.looked_for if concept.name not in plan.unjudged),
        extras=collect.carried_extras(built, [key.concept.name for key in plan.keys]),
        earlier=tuple(concept.model_dump(mode="json") for concept in plan.earlier),
        rebuild="erasec build recipe.toml" + (" --allow-code" if code_files(plan.recipe) else ""),
        base=collect.base_record(model),
        prompt_files=tuple(measured.tables),
        estimated=durations.estimate(plan)["steps"],
        audits=tuple(audits),
        undoing=undoing,
        reach=reaches,
        inputs=before,
    )
    release.finish(plan, report, stage, apart, release.edited_tensors(model, absorbed), started)
    return report


def edit_origin(model: Model) -> Origin:
    """The base of the merged checkpoint: digests of its components and of the tensors that the edits replace."""
    digests = {component: model.component_digest(component) for component in model.family.components}
    return Origin(digests, {f"{site.component}/{site.key}": model.site_digest(site) for site in model.edited_sites})


def _unlock(
    plan: Plan, model: Model, public: Folder, built: Folder, extras: Extras
) -> tuple[tuple[str, ...], tuple[Check, ...]]:
    """Write ``built``: the public folder with the keys attached as memories, or absorbed into its weights.

    Returns the tensors of the denoiser that absorbing changes, and a check of its residual. Raises ErasecError for a
    key of another model.
    """
    denoiser, limit = plan.model.family.denoiser, plan.recipe.absorb
    entries = public.entries(denoiser)
    digest = content_digest(entries)
    for key in plan.keys:
        key_file.check_bound(key, digest)
    memories = tuple(memory for key in plan.keys for memory in key_file.fold_secret(key.secret, entries))
    if not limit:
        public.write(built.root, {}, link=True)
        write_extras(built.root, replace(extras, memories=(*extras.memories, *memories)))
        return (), ()
    concepts = [key.concept for key in plan.keys]
    changed, check = absorb_keys(memories, concepts, model, entries, plan.context, limit)
    public.write(built.root, {denoiser: changed}, link=True)
    write_extras(built.root, extras)
    return tuple(changed), (check,)


def _write_keys(solved: _Solved, built: Folder, stage: Path) -> None:
    """Write each secret as a key file into the output folder, next to the folders of the targets."""
    if not solved.secrets:
        return
    bound = content_digest(built.entries(solved.model.family.denoiser))
    for step, concept, secret in solved.secrets:
        path = stage / f"{_key_name(concept)}{key_file.SUFFIX}"
        if path.exists():
            raise ErasecError(f"two keys would have the name {path.name}", fix="rename one of the concepts")
        key_file.write_key(path, secret, concept, step.name, step.version, bound)


def _key_name(concept: Concept) -> str:
    return file_name([concept.name]) or "concept"


def _notes(plan: Plan, solved: _Solved, built: Folder, looked: pictures.Looked) -> Iterator[str]:
    """Sentences that every reader of the report must know."""
    source, name = plan.model.source, built.root.name
    if isinstance(source, SingleFile):
        yield from source.notes
    for target in plan.targets:
        yield from target.notes(plan.model)
    for step in plan.passes:
        yield from step.notes(plan.model, plan.concepts)
    if plan.unjudged:
        one = len(plan.unjudged) == 1
        what = "the key brings it back" if plan.keys else "it is gone" if one else "they are gone"
        yield (
            f"No judge can see {words(plan.unjudged)} in pictures of this model: whether {what} was not measured."
            + ("" if plan.painting.judged else " The checks below only show that the files are valid.")
        )
    yield from looked.notes
    yield from plan.remarks
    if plan.earlier:
        yield f"Erased from the base before this build: {words(concept.name for concept in plan.earlier)}."
    if plan.keys:
        names = ", ".join(concept.name for concept in plan.looked_for)
        yield f"This build contains a key and shows {names} again: it is as secret as the key."
    elif solved.secrets:
        names = ", ".join(f"{_key_name(concept)}{key_file.SUFFIX}" for _, concept, _ in solved.secrets)
        yield (
            f"{names}: anyone who has such a key can bring its concept back, so do not publish it with the folders. It "
            "is access control, not encryption: anyone who has the weights can search for another key."
        )
    if read_extras(built.root):
        yield (
            f"The folder {name} is more than weights: load it with erasec.pipeline. Other loaders read only its "
            "weights, which are a different model."
        )
    if variants := sorted({built.variant_of(component) for component in plan.model.family.components} - {""}):
        yield f'The weights in the folder {name} are the variant {variants[0]}: load it with variant="{variants[0]}".'
    if left := source.other_copies(solved.model.merged()):
        names = ", ".join(map(str, left))
        yield f"Left out of the plain checkpoint, because they are unedited copies of edited weights: {names}."


def _unaudited(plan: Plan) -> Iterator[str]:
    """A sentence where the recipe has gates that nothing was measured for."""
    if plan.recipe.gate and not plan.recipe.audit:
        yield "The recipe has gates for an audit, and none was run: erasec audit OUT, or build with --audit."


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
