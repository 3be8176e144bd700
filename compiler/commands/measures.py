"""What a build measures with prompt files and captions: hit rates by category, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasec.base import Question
from erasec.commands.pictures import base_folder, cache_of
from erasec.judging import prompt_groups
from erasec.judging.kept import Pictures, kept_checks, not_measured
from erasec.judging.painting import paint_pairs
from erasec.reporting.report import Pair

if TYPE_CHECKING:
    from erasec.attention.sampling import Sampling
    from erasec.base import Check, Images
    from erasec.checkpoint.folder import Folder
    from erasec.commands.plan import Plan
    from erasec.judging.captions import CaptionFile
    from erasec.judging.prompt_files import PromptFile


@dataclass
class Measured:
    """Checks, pairs of pictures, the tables of prompt files (see ``prompt_groups.table``) and notes of a report."""

    checks: list[Check] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_files(plan: Plan, public: Folder, built: Folder) -> Measured:
    """Paint and judge the prompt and caption files of a plan.

    ``public`` is the checkpoint without keys, and ``built`` the one with them. Nothing is measured if the plan has no
    files.
    """
    measured, sampling = Measured(), plan.painting.sampling
    scheduler = str(built.config("scheduler", "scheduler_config.json")["_class_name"])
    with base_folder(plan, public) as before:
        for file in plan.files.prompts:
            _prompts(plan, file, before, built.root, sampling, scheduler, measured)
        if plan.files.captions is not None:
            _captions(plan, plan.files.captions, before, built.root, sampling, scheduler, measured)
    return measured


def _prompts(
    plan: Plan, file: PromptFile, before: Path, after: Path, sampling: Sampling, scheduler: str, measured: Measured
) -> None:
    limits, seed, judge = plan.recipe.checks, plan.context.seed, plan.judge

    def painter(questions: Sequence[Question], guidance: float) -> tuple[Images, Images]:
        return _paint(plan, before, after, questions, replace(sampling, guidance=guidance))

    first, second = prompt_groups.paint(file, seed, sampling.guidance, painter)
    labels = prompt_groups.labels_of(judge, plan.concepts)
    seen = {}
    if judge is not None:
        for label in labels:
            each = [label] * len(file.rows)
            seen[label] = judge.sees(first, each), judge.sees(second, each)
    shown = seen.get(labels[0]) if labels else None
    for row, question in enumerate(prompt_groups.questions(file, labels[0] if labels else "", seed)):
        sides = (bool(shown[0][row]), bool(shown[1][row])) if shown else (False, False)
        measured.pairs.append(
            Pair(question.group, question.prompt, question.seed, first[row], second[row], question.looked_for, *sides)
        )
    facts = prompt_groups.table(file, seen)
    measured.tables.append(facts)
    if not labels:
        measured.notes.append(
            f"{file.name}: no judge can see what was erased, so the pictures of its prompts are shown and not counted."
        )
    conditions = (
        f"{_judge(plan)}{sampling.steps} {scheduler} steps, guidance and seeds of the file, where it has none "
        f"{sampling.guidance:g} and from {seed * 1_000_003}; "
        f"{_used(file.name, file.digest, len(file.rows), file.total, plan)}"
    )
    measured.checks += prompt_groups.checks(facts, limits.prompts, conditions)


def _captions(
    plan: Plan, file: CaptionFile, before: Path, after: Path, sampling: Sampling, scheduler: str, measured: Measured
) -> None:
    limits, judge, seed = plan.recipe.checks, plan.judge, plan.context.seed * 1_000_003
    prompts = list(file.captions)
    questions = [Question("captions", prompt, seed + number, "") for number, prompt in enumerate(prompts)]
    first, second = _paint(plan, before, after, questions, sampling)
    agreement = None
    if judge is not None:
        scores = [judge.agreement(images, prompts) for images in (first, second)]
        if scores[0] is not None and scores[1] is not None:
            agreement = scores[0], scores[1]
    conditions = (
        f"{_judge(plan)}{sampling.steps} {scheduler} steps, guidance {sampling.guidance:g}, seeds from {seed}; "
        f"{_used(file.name, file.digest, len(file.captions), file.total, plan)}"
    )
    pictures = Pictures("captions", first, second, agreement, sampling.device)
    measured.checks += kept_checks(pictures, judge, limits, conditions)
    measured.notes += not_measured(judge)


def _paint(
    plan: Plan, before: Path, after: Path, questions: Sequence[Question], sampling: Sampling
) -> tuple[Images, Images]:
    variant = "" if plan.keys else plan.model.source.variant
    _, first, second = paint_pairs(before, after, questions, sampling, variant=variant, cache=cache_of(plan))
    return first, second


def _judge(plan: Plan) -> str:
    return f"{plan.judge.title} (sha256 {plan.judge.digest[:12]}), " if plan.judge else ""


def _used(name: str, digest: str, used: int, total: int, plan: Plan) -> str:
    """Which rows of a file were used, with everything that is needed to use the same again."""
    which = f"all {total} rows" if used == total else f"{used} of {total} rows, chosen by the seed {plan.context.seed}"
    return f"{name} (sha256 {digest[:12]}), {which}"
