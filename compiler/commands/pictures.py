"""The pictures of a build: what is painted before and after the edit, what the judge sees, and the checks of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from erasec import registry
from erasec.base import Check
from erasec.checkpoint.folder import Folder
from erasec.errors import reason, words
from erasec.judging import picture_cache
from erasec.keys import key_file
from erasec.ldm.single_file import SingleFile
from erasec.model.sidecar import write_extras

if TYPE_CHECKING:
    from erasec.base import Artifact, Judge
    from erasec.commands.plan import Plan
    from erasec.judging.evidence import Evidence
    from erasec.model.memory import Secret
    from erasec.model.sidecar import Extras
    from erasec.recipe.concept import Concept

JUDGED = "judged"  # the name of the check of --gate


@dataclass(frozen=True)
class Looked:
    """What was seen in the pictures of a build: the evidence, its checks, and notes about the pictures."""

    evidence: tuple[Evidence, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def unjudged_notes(plan: Plan) -> list[str]:
    """A note that the build will be rejected, because it requires a judge and none can see some of its concepts."""
    if not (plan.unjudged and plan.recipe.checks.require_judge):
        return []
    return [
        f"No judge can see {words(plan.unjudged)} in pictures of this model: the build will be rejected, because "
        "it requires a judge. --judge names another judge."
    ]


def end(plan: Plan) -> str:
    """The best state in which the build can end, and why it is not "passed"; "" where it can be."""
    if not plan.unjudged:
        return ""
    best = "rejected" if plan.recipe.checks.require_judge else "not judged at best"
    return f"{best}: no judge can see {words(plan.unjudged)}"


def gate_checks(plan: Plan) -> list[Check]:
    """The check that a judge can see every concept, where the recipe requires one (--gate)."""
    if not plan.recipe.checks.require_judge:
        return []
    names = [concept.name for concept in plan.looked_for]
    how = f"concepts that no judge can see in pictures of {plan.model.name}, of {words(names)}"
    if plan.unjudged:
        judges = ", ".join(registry.judges())
        how += f"; no judge can see {words(plan.unjudged)} (judges: {judges}, or one of your own by --judge)"
    return [Check.at_most(JUDGED, float(len(plan.unjudged)), 0.0, how)]


def look(
    plan: Plan, secrets: Sequence[tuple[Concept, Secret]], public: Folder, built: Folder, extras: Extras
) -> Looked:
    """Paint the pictures before and after the edit, and let the judge look at them.

    ``public`` is the checkpoint without keys, ``built`` the one with them, ``extras`` what it carries, and ``secrets``
    are those of this build with their concepts. Pictures that no judge looks at are a service: where they cannot be
    painted, a note says why.
    """
    painting = plan.painting
    if not painting:
        return Looked(notes=(f"Pictures before and after: {painting.text}.",) if painting.obstacle else ())
    if painting.judged:
        return _judge(plan, secrets, public, built, extras)
    try:
        looked = _judge(plan, secrets, public, built, extras)
    except Exception as error:  # each library raises its own classes
        return Looked(notes=(f"No pictures could be painted: {getattr(error, 'what', '') or reason(error)}.",))
    note = f"The pictures are for people to look at, because no judge looked at them: {painting.text}."
    if looked.evidence and (left := looked.evidence[0].left_out):
        note += f" Of {left + len(looked.evidence[0].questions)} prompts, {left} were left out for lack of time."
    return replace(looked, notes=(note,) if looked.evidence else ())


def cache_of(plan: Plan) -> str:
    """The name of the base in the cache of pictures; "" if pictures of the base are not cached.

    A judge of a small world gets the pictures of its own batches: one of another batch differs in its last bits, and
    painting it again takes a moment. The base of a build with keys is none of a second build.
    """
    cached = not plan.keys and (plan.judge is None or plan.judge.everyday)
    return picture_cache.identity(plan.model) if cached else ""


def _judge(
    plan: Plan, secrets: Sequence[tuple[Concept, Secret]], public: Folder, built: Folder, extras: Extras
) -> Looked:
    """The evidence before and after the edit, and its checks. Both are empty if there are no questions."""
    from erasec.judging import validate
    from erasec.judging.evidence import gather_evidence, with_key

    limits, seed, judge, painting = plan.recipe.checks, plan.context.seed, plan.judge, plan.painting
    scheduler = built.config("scheduler", "scheduler_config.json")["_class_name"]
    unlocked = [key.concept for key in plan.keys]
    with base_folder(plan, public) as base:
        evidence = gather_evidence(
            judge,
            plan.looked_for,
            base,
            built.root,
            painting.images,
            seed,
            painting.sampling,
            keyed=bool(unlocked),
            earlier=plan.earlier,
            pictures=painting.pictures,
            minutes=painting.minutes or math.inf,
            variant="" if unlocked else plan.model.source.variant,
            cache=cache_of(plan),
        )
    if evidence is None:
        return Looked()
    gathered, checks = [evidence], list(validate.checks(evidence, judge, limits, seed, scheduler))
    if judge is None:
        return Looked((evidence,), tuple(checks))
    for concept in unlocked:
        checks += validate.recovery_checks(judge, concept, evidence, None, limits, seed, scheduler)
    for concept, secret in () if unlocked else secrets:
        memories = key_file.fold_secret(secret, built.entries(plan.model.family.denoiser))
        with _copy_with_extras(built, replace(extras, memories=(*extras.memories, *memories))) as keyed:
            keyed_evidence = with_key(judge, concept, evidence, keyed, painting.sampling)
        if keyed_evidence is not None:
            gathered.append(keyed_evidence)
            checks += validate.recovery_checks(judge, concept, keyed_evidence, evidence, limits, seed, scheduler)
    return Looked(tuple(gathered), tuple(checks))


@contextmanager
def base_folder(plan: Plan, public: Folder) -> Iterator[Path]:
    """The folder of the pictures before: of a build with keys the one without them, otherwise that of the model. A
    single file is written as a folder for the block."""
    source = plan.model.source
    if plan.keys:
        yield public.root
    elif not isinstance(source, SingleFile):
        yield source.root
    else:
        with TemporaryDirectory(prefix=".base-", dir=public.root.parent) as scratch:
            source.write(Path(scratch) / "base", {})
            yield Path(scratch) / "base"


@contextmanager
def _copy_with_extras(folder: Folder, extras: Extras) -> Iterator[Path]:
    """A hard-linked copy of a folder with other extras, deleted when the block ends."""
    with TemporaryDirectory(prefix=".keyed-", dir=folder.root.parent) as scratch:
        root = Path(scratch) / "model"
        folder.write(root, {}, link=True)
        write_extras(root, extras)
        yield root


def check_artifacts(
    plan: Plan, judge: Judge, evidence: Evidence, built: Folder, artifacts: Sequence[Artifact]
) -> Iterator[Check]:
    """Checks of pictures that the artifacts generate, for each artifact that a portable runtime can run."""
    from erasec.judging import validate

    runtimes = [registry.load_runtime(name) for name in registry.runtimes()]
    pairs = [
        (artifact, runtime)
        for artifact in artifacts
        for runtime in runtimes
        if runtime.portable and artifact.target in runtime.folders
    ]
    if pairs and plan.painting.sampling.dtype != "float32":
        evidence = _in_float32(plan, judge, evidence, built)
    for artifact, runtime in pairs:
        scheduler = Folder(artifact.path).config("scheduler", "scheduler_config.json")["_class_name"]
        limits, seed = plan.recipe.checks, plan.context.seed
        yield from validate.artifact_checks(
            judge, evidence, artifact.path, runtime.name, artifact.precision, limits, seed, scheduler
        )


def _in_float32(plan: Plan, judge: Judge, evidence: Evidence, built: Folder) -> Evidence:
    """The rows that artifacts are compared by, painted in float32: the tolerances are those of the artifacts alone."""
    from erasec.attention.pipeline import generate
    from erasec.judging import validate
    from erasec.judging.evidence import judge_pictures

    rows = validate.compared(evidence)
    questions, sampling = [evidence.questions[row] for row in rows], replace(plan.painting.sampling, dtype="float32")
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    after = generate(built.root, prompts, seeds, sampling, "pictures in float32")
    return replace(judge_pictures(judge, questions, evidence.before[rows], after), sampling=sampling)
