"""Checks of a built checkpoint against its base: is the concept gone, is the rest still there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.base import Check
from erasec.judging.judge import Images, Judge, Question, Sampling, generate

if TYPE_CHECKING:
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.recipe.recipe import Limits

ERASED_GROUPS = ("name", "synonym", "implicit")
# Targets whose artifacts run wherever they are built, and what runs them.
RUN_BY = {"onnx": "ort", "openvino": "openvino"}
PICTURES = 8
# By precision, the least PSNR of an artifact's pictures against torch's, in dB, and the largest share of other labels.
# Measured on glyphs: 84 to 89 dB in float32, 60 to 73 in float16, 46 in int8; 24 for the base in place of the edited.
ALIKE = {"int8": (35.0, 1 / PICTURES), "fp16": (45.0, 1 / PICTURES), "fp32": (50.0, 0.0)}


@dataclass(frozen=True)
class Evidence:
    """The questions, their pictures before and after, and what the judge saw in them."""

    questions: tuple[Question, ...]
    before: Images
    after: Images
    shown_before: NDArray[np.bool_]
    shown_after: NDArray[np.bool_]
    colour_before: NDArray[np.bool_]
    colour_after: NDArray[np.bool_]
    agreement_before: NDArray[np.float64]
    agreement_after: NDArray[np.float64]

    def rows(self, group: str) -> NDArray[np.bool_]:
        return np.array([question.group == group for question in self.questions], dtype=bool)


def judge_of(model: Model) -> Judge | None:
    """The judge that knows this model's world, or None."""
    from erasec.glyphs.judging import GlyphJudge

    return GlyphJudge.for_model(model)


def gather(
    judge: Judge, concepts: Sequence[Concept], base: Path, built: Path, images: int, seed: int, sampling: Sampling,
    keyed: bool = False,
) -> Evidence | None:  # fmt: skip
    """Ask the panel of every concept of both checkpoints, same prompts and seeds. None where there is no question.

    Where ``keyed``, ``built`` is ``base`` with the keys of the concepts: only their names are asked for, as the group
    "keyed", and what stays.
    """
    asked = {question: None for concept in concepts for question in judge.panel(concept, images, seed)}
    gone = {question.looked_for for question in asked if question.group != "keep"}
    # What another concept of the same build erases is not to be kept.
    questions = tuple(question for question in asked if question.group != "keep" or question.looked_for not in gone)
    if keyed:
        named = (replace(each, group="keyed") if each.group == "name" else each for each in questions)
        questions = tuple(question for question in named if question.group in ("keyed", "keep"))
    if not questions:
        return None
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    before = generate(base, prompts, seeds, sampling, "pictures before")
    after = generate(built, prompts, seeds, sampling, "pictures after")
    shapes = [question.looked_for for question in questions]
    colours = [question.colour or question.looked_for for question in questions]
    return Evidence(
        questions, before, after,
        judge.sees(before, shapes), judge.sees(after, shapes), judge.sees(before, colours), judge.sees(after, colours),
        judge.agreement(before, prompts), judge.agreement(after, prompts),
    )  # fmt: skip


def labels(judge: Judge, concept: Concept) -> frozenset[str]:
    """What the judge looks for where prompts name the concept, or, for a mark, where they do not; empty where it cannot
    see it."""
    group = "implicit" if concept.kind == "mark" else "name"
    return frozenset(question.looked_for for question in judge.panel(concept, 1, 0) if question.group == group)


def with_key(judge: Judge, concept: Concept, evidence: Evidence, keyed: Path, sampling: Sampling) -> Evidence | None:
    """The prompts and seeds that name the concept once more, of the built checkpoint and of ``keyed``, which is that
    with a key; their group is "keyed". None where there are none."""
    seen = labels(judge, concept)
    rows = [row for row, each in enumerate(evidence.questions) if each.group == "name" and each.looked_for in seen]
    if not rows:
        return None
    questions = tuple(replace(evidence.questions[row], group="keyed") for row in rows)
    prompts, shapes = [each.prompt for each in questions], [each.looked_for for each in questions]
    after = generate(keyed, prompts, [each.seed for each in questions], sampling, "pictures with the key")
    colours = [each.colour or each.looked_for for each in questions]
    return Evidence(
        questions, evidence.after[rows], after, evidence.shown_after[rows], judge.sees(after, shapes),
        evidence.colour_after[rows], judge.sees(after, colours), evidence.agreement_after[rows],
        judge.agreement(after, prompts),
    )  # fmt: skip


def recovered(
    judge: Judge, concept: Concept, keyed: Evidence, base: Evidence | None, limits: Limits, seed: int, scheduler: str
) -> tuple[Check, ...]:
    """Whether the key brings its concept back: its hit rate, over that of ``base`` before the edit where it is given.

    No check where the judge cannot see the concept. What never showed in the base proves nothing and fails.
    """
    seen = labels(judge, concept)

    def rows(evidence: Evidence, group: str) -> NDArray[np.bool_]:
        found = [question.group == group and question.looked_for in seen for question in evidence.questions]
        return np.array(found, dtype=bool)

    asked = rows(keyed, "keyed")
    if not asked.any():
        return ()
    value = float(keyed.shown_after[asked].mean())
    how = f"hit rate with the key, {value:.0%}; {float(keyed.shown_before[asked].mean()):.0%} without"
    if base is not None:
        before = float(base.shown_before[rows(base, "name")].mean())
        value = value / before if before else 0.0
        how = f"hit rate with the key over that of the base, {how}, {before:.0%} in the base"
    how += f"; {asked.sum()} prompts; {_how_made(keyed, judge, limits, seed, scheduler)}"
    return (Check(f"recovered/{concept.name}", value, limits.recovered, value >= limits.recovered, how),)


def _how_made(evidence: Evidence, judge: Judge, limits: Limits, seed: int, scheduler: str) -> str:
    prompts = "\n".join(f"{question.seed} {question.prompt}" for question in evidence.questions)
    return (
        f"{judge.name} (sha256 {judge.digest[:12]}), {limits.steps} {scheduler} steps, guidance {limits.guidance:g}, "
        f"seeds from {seed * 1_000_003}, prompts and seeds sha256 {hashlib.sha256(prompts.encode()).hexdigest()[:12]}"
    )


def checks(evidence: Evidence, judge: Judge, limits: Limits, seed: int, scheduler: str) -> tuple[Check, ...]:
    """One check for each promise; of several concepts, the worst counts. What never showed proves nothing and fails."""
    how_made = _how_made(evidence, judge, limits, seed, scheduler)
    found = []
    for group in ERASED_GROUPS:
        rows = evidence.rows(group)
        if not rows.any():
            continue
        found_rates = rates(evidence, group)
        limit = limits.implicit if group == "implicit" else limits.erased
        ratio = max(row["after"] / row["before"] if row["before"] else float("inf") for row in found_rates)
        told = ", ".join(f"{row['looked_for']} {row['after']:.0%} of {row['before']:.0%}" for row in found_rates)
        how = f"hit rate after over before, {told}, {rows.sum()} prompts; {how_made}"
        found.append(Check(f"erased/{group}", ratio, limit, limit is None or ratio <= limit, how))
    keep = evidence.rows("keep")
    if keep.any():
        found += _kept(evidence, keep, limits, how_made)
    return tuple(found)


def _kept(evidence: Evidence, keep: NDArray[np.bool_], limits: Limits, how_made: str) -> list[Check]:
    def check(name: str, value: float, limit: float | None, how: str) -> Check:
        return Check(name, value, limit, limit is None or value <= limit, f"{how}; {how_made}")

    before, after = evidence.shown_before[keep].mean(), evidence.shown_after[keep].mean()
    worst = max(rates(evidence, "keep"), key=lambda row: row["before"] - row["after"])
    coloured = keep & np.array([bool(question.colour) for question in evidence.questions])
    colour_before, colour_after = evidence.colour_before[coloured].mean(), evidence.colour_after[coloured].mean()
    agreed_before, agreed_after = evidence.agreement_before[keep].mean(), evidence.agreement_after[keep].mean()
    moved = np.abs(evidence.after[keep].astype(np.float64) - evidence.before[keep]).mean() / 255
    return [
        check("kept/shapes", float(before - after), limits.kept,
              f"mean loss of hit rate, {before:.1%} to {after:.1%} over {keep.sum()} prompts; "
              f"worst {worst['looked_for']} {worst['before']:.0%} to {worst['after']:.0%}"),
        check("kept/colours", float(colour_before - colour_after), limits.kept,
              f"loss of asked-for colours, {colour_before:.1%} to {colour_after:.1%} over {coloured.sum()} prompts"),
        check("kept/agreement", float(agreed_before - agreed_after), limits.agreement,
              f"loss of the cosine between picture and prompt, {agreed_before:.3f} to {agreed_after:.3f}"),
        check("kept/drift", float(moved), limits.drift, "mean absolute change of a pixel, full scale 1, same seeds"),
    ]  # fmt: skip


def deployed(
    judge: Judge, evidence: Evidence, folder: Path, target: str, precision: str, limits: Limits, seed: int,
    scheduler: str,
) -> tuple[Check, ...]:  # fmt: skip
    """Whether the artifact in ``folder`` paints as the checkpoint does: a few of the prompts and seeds once more.

    Their median PSNR against the pictures after the edit, and the labels that the judge sees otherwise.
    """
    from erasec.runtime.bundle import open_bundle

    every = len(evidence.questions)
    rows = np.linspace(0, every - 1, min(PICTURES, every)).round().astype(int)
    asked = [evidence.questions[row] for row in rows]
    with closing(open_bundle(folder, RUN_BY[target])) as bundle:
        prompts, seeds = [each.prompt for each in asked], [each.seed for each in asked]
        pictures = bundle.generate(prompts, seeds, limits.steps, limits.guidance)
    (least, most), ratio = ALIKE[precision], psnr(pictures, evidence.after[rows])
    other = judge.sees(pictures, [each.looked_for for each in asked]) != evidence.shown_after[rows]
    other |= judge.sees(pictures, [each.colour or each.looked_for for each in asked]) != evidence.colour_after[rows]
    made = _how_made(replace(evidence, questions=tuple(asked)), judge, limits, seed, scheduler)
    how = f"{len(rows)} pictures by {RUN_BY[target]}, {precision}, against torch's of the same seeds"
    alike, apart = float(np.median(ratio)), float(other.mean())
    return (
        Check(f"pictures/{target}", alike, least, alike >= least, f"median PSNR in dB, {how}; {made}"),
        Check(f"labels/{target}", apart, most, apart <= most, f"share that the judge sees otherwise, {how}; {made}"),
    )


def psnr(a: Images, b: Images) -> NDArray[np.float64]:
    """Peak signal over noise of each pair of images (n, h, w, 3), in dB, (n,); equal ones count as one level apart in
    one place."""
    apart = np.square(a.astype(np.float64) - b).reshape(len(a), -1)
    ratio: NDArray[np.float64] = 10 * np.log10(255**2 / apart.mean(axis=1).clip(1 / apart.shape[1]))
    return ratio


def rates(evidence: Evidence, group: str) -> list[dict[str, Any]]:
    """Hit rates before and after, one row for each label that the group looked for."""
    found = []
    for label in dict.fromkeys(question.looked_for for question in evidence.questions if question.group == group):
        rows = np.array([q.group == group and q.looked_for == label for q in evidence.questions])
        found.append({
            "group": group, "looked_for": label, "images": int(rows.sum()),
            "before": float(evidence.shown_before[rows].mean()), "after": float(evidence.shown_after[rows].mean()),
        })  # fmt: skip
    return found
