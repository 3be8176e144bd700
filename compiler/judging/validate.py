"""Checks of a build by its pictures: the concept is gone, the rest is kept, and artifacts agree with torch."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from erasec.attention.sampling import Sampling
from erasec.base import Check
from erasec.judging.evidence import labels, rates
from erasec.judging.intervals import wilson
from erasec.judging.kept import Pictures, kept_checks
from erasec.judging.protocols import protocol_counts
from erasec.model.threads import THREADS
from erasec.runtime.bundle import open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from erasec.base import Images, Judge
    from erasec.judging.evidence import Evidence
    from erasec.recipe.concept import Concept
    from erasec.recipe.recipe import Limits

ERASED_GROUPS = ("name", "synonym", "implicit")
PICTURES = 8  # pictures of an artifact that are compared with torch's
AT_ONCE = 256 * 256  # pixels; larger ones are made one by one, because eight of 512 x 512 take 14 GB to decode
# By precision: the least PSNR of an artifact's pictures against torch's, in dB, and the largest share of pictures with
# another label. On glyphs the PSNR is 84 to 89 dB in float32, 60 to 73 in float16, 46 in int8, and 24 for the unedited
# model.
AGREEMENT = {"int8": (35.0, 1 / PICTURES), "fp16": (45.0, 1 / PICTURES), "fp32": (50.0, 0.0)}

# Of at most so many concepts the worst one counts.
POOLED = 8


def checks(evidence: Evidence, judge: Judge | None, limits: Limits, seed: int, scheduler: str) -> tuple[Check, ...]:
    """The checks "erased" and "kept", one for each group of prompts; of several concepts the worst counts.

    More than ``POOLED`` concepts have few pictures each, of which one hit more or less is chance: their pictures count
    together. A single concept counts by the lower end of Wilson's 95 % interval of its rate, so that one that is
    certainly left among many that are gone still fails.

    A picture by a prompt of one erased concept must not show another one either. A concept that the base never shows
    fails its check, because its erasure cannot be measured. Without a judge there are the checks "pictures/finite" and
    "kept/drift", which need no labels.
    """
    conditions = _conditions(evidence, judge, limits, seed, scheduler)
    results = list(_finite(evidence, conditions))
    for group in ERASED_GROUPS:
        rows = evidence.rows(group) & evidence.labelled
        if not rows.any():
            continue
        worst, surely, shown, before, parts = 0.0, 0.0, 0.0, 0.0, []
        by_label = rates(evidence, group)
        for row in by_label:
            others = _other_rates(evidence, group, row["looked_for"])
            most = max((row["after"], *others.values()))
            worst = max(worst, most / row["before"] if row["before"] else float("inf"))
            surely = max(surely, wilson(round(most * row["images"]), row["images"])[0])
            shown, before = shown + most * row["images"], before + row["before"] * row["images"]
            parts.append(f"{row['looked_for']} {row['after']:.0%} of {row['before']:.0%}")
            parts += protocol_counts(judge, evidence, group, row["looked_for"])
            parts += [f"{row['looked_for']} shown as {other} {rate:.0%}" for other, rate in others.items() if rate]
        listed = ", ".join(parts)
        if len(by_label) > POOLED:
            worst = max(surely, shown / before if before else float("inf"))
            counts = f"{before:.0f} pictures before and {shown:.0f} after that show it or another erased one"
            listed = (
                f"all {len(by_label)} concepts together, {counts}; or a single one, by the lower end of its interval"
            )
        how = f"hit rate after over before, {listed}, {rows.sum()} prompts; {conditions}"
        limit = limits.implicit if group == "implicit" else limits.erased
        results.append(Check.at_most(f"erased/{group}", worst, limit, how))
    keep = evidence.rows("keep")
    if keep.any():
        results += _kept(evidence, keep, judge, limits, conditions)
    return tuple(results)


def _finite(evidence: Evidence, conditions: str) -> Iterator[Check]:
    """The check that pictures that no judge looks at are pictures: NaN and infinity in a network make them black."""
    rows = ~evidence.labelled
    if not rows.any():
        return
    blank = [_blank(pictures[rows]) for pictures in (evidence.before, evidence.after)]
    how = (
        f"share of pictures of a single colour, as numbers that are not finite make them, {blank[0]:.0%} before and "
        f"{blank[1]:.0%} after over {rows.sum()} prompts; {conditions}"
    )
    yield Check.at_most("pictures/finite", blank[1], 0.0, how)


def _blank(pictures: Images) -> float:
    """The share of pictures (n, height, width, 3) in which all pixels are equal."""
    return float((pictures == pictures[:, :1, :1]).all(axis=(1, 2, 3)).mean())


def _other_rates(evidence: Evidence, group: str, label: str) -> dict[str, float]:
    """For each other erased label, the share of pictures that show it after the edit, of those for ``label``."""
    rows = np.array([item.group == group and item.looked_for == label for item in evidence.questions])
    return {other: float(seen[rows].mean()) for other, seen in evidence.erased_after.items() if other != label}


def _kept(
    evidence: Evidence, keep: NDArray[np.bool_], judge: Judge | None, limits: Limits, conditions: str
) -> list[Check]:
    """The checks "kept", from the questions in the mask ``keep``. Hit rates are those of questions with a label."""
    results, looked = [], keep & evidence.labelled
    if looked.any():
        before, after = evidence.shown_before[looked].mean(), evidence.shown_after[looked].mean()
        worst = max(rates(evidence, "keep"), key=lambda row: row["before"] - row["after"])
        how = (
            f"mean loss of hit rate, {before:.1%} to {after:.1%} over {looked.sum()} prompts; "
            f"worst {worst['looked_for']} {worst['before']:.0%} to {worst['after']:.0%}; {conditions}"
        )
        results.append(Check.at_most("kept/hits", float(before - after), limits.kept, how))
    coloured = looked & np.array([bool(question.colour) for question in evidence.questions])
    if coloured.any():
        before, after = evidence.colour_before[coloured].mean(), evidence.colour_after[coloured].mean()
        how = f"loss of hit rate for the colours in prompts, {before:.1%} to {after:.1%} over {coloured.sum()} prompts"
        results.append(Check.at_most("kept/colours", float(before - after), limits.kept, f"{how}; {conditions}"))
    scores = evidence.agreement_before[keep], evidence.agreement_after[keep]
    agreement = None if np.isnan(scores[0]).any() else scores  # a judge need not compare pictures with prompts
    pictures = Pictures("kept", evidence.before[keep], evidence.after[keep], agreement)
    return [*results, *kept_checks(pictures, judge, limits, conditions)]


def recovery_checks(
    judge: Judge, concept: Concept, keyed: Evidence, base: Evidence | None, limits: Limits, seed: int, scheduler: str
) -> tuple[Check, ...]:
    """The check that the key brings its concept back. No check if the judge has no label for the concept.

    Its value is the hit rate with the key, divided by the hit rate of the base if ``base`` is given. A concept that the
    base never shows fails its check, because its recovery cannot be measured.
    """
    known = labels(judge, concept)

    def mask(evidence: Evidence, group: str) -> NDArray[np.bool_]:
        chosen = [question.group == group and question.looked_for in known for question in evidence.questions]
        return np.array(chosen, dtype=bool)

    rows = mask(keyed, "keyed")
    if not rows.any():
        return ()
    value = float(keyed.shown_after[rows].mean())
    how = f"hit rate with the key, {value:.0%}; {float(keyed.shown_before[rows].mean()):.0%} without"
    if base is not None:
        before = float(base.shown_before[mask(base, "name")].mean())
        value = value / before if before else 0.0
        how = f"hit rate with the key over that of the base, {how}, {before:.0%} in the base"
    how += f"; {rows.sum()} prompts; {_conditions(keyed, judge, limits, seed, scheduler)}"
    return (Check(f"recovered/{concept.name}", value, limits.recovered, value >= limits.recovered, how),)


def artifact_checks(
    judge: Judge,
    evidence: Evidence,
    folder: Path,
    runtime: str,
    precision: str,
    limits: Limits,
    seed: int,
    scheduler: str,
) -> tuple[Check, ...]:
    """Checks that ``runtime``, with the artifact in ``folder``, generates the same pictures as torch.

    ``PICTURES`` of the questions with a label are generated again (see ``compared``). "pictures" is their median PSNR
    against torch's pictures after the edit, "labels" the share of pictures with another label or colour.
    """
    rows = compared(evidence)
    questions = tuple(evidence.questions[row] for row in rows)
    with closing(open_bundle(folder, runtime, THREADS)) as bundle:
        prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
        height, width = evidence.after.shape[1:3]
        batch = 1 if height * width > AT_ONCE else None
        pictures = bundle.generate(prompts, seeds, limits.steps, limits.guidance, batch=batch)
    ratio = float(np.median(psnr(pictures, evidence.after[rows])))
    colours = [question.colour or question.looked_for for question in questions]
    differs = judge.sees(pictures, [question.looked_for for question in questions]) != evidence.shown_after[rows]
    differs |= judge.sees(pictures, colours) != evidence.colour_after[rows]
    least, most = AGREEMENT[precision]
    conditions = _conditions(replace(evidence, questions=questions, sampling=None), judge, limits, seed, scheduler)
    how = f"{len(rows)} pictures by {runtime}, {precision}, against torch's of the same seeds; {conditions}"
    return (
        Check(f"pictures/{folder.name}", ratio, least, ratio >= least, f"median PSNR in dB, {how}"),
        Check.at_most(f"labels/{folder.name}", float(differs.mean()), most, f"share with another label, {how}"),
    )


def compared(evidence: Evidence) -> NDArray[np.int64]:
    """The rows of the pictures that artifacts are compared by: some of those with a label, over all groups."""
    labelled = np.flatnonzero(evidence.labelled)
    picked = np.linspace(0, len(labelled) - 1, min(PICTURES, len(labelled))).round().astype(int)
    rows: NDArray[np.int64] = labelled[picked]
    return rows


def _conditions(evidence: Evidence, judge: Judge | None, limits: Limits, seed: int, scheduler: str) -> str:
    """How the pictures were generated and judged, with everything that is needed to repeat it."""
    listed = "\n".join(f"{question.seed} {question.prompt}" for question in evidence.questions)
    sampling = evidence.sampling or Sampling(limits.steps, limits.guidance)
    height, width = evidence.after.shape[1:3]
    who = f"{judge.title} (sha256 {judge.digest[:12]})" if judge else "no judge"
    return (
        f"{who}, {sampling.steps} {scheduler} steps, "
        f"guidance {sampling.guidance:g}, {width} x {height} pixels, {sampling.where}, seeds from {seed * 1_000_003}, "
        f"prompts and seeds sha256 {hashlib.sha256(listed.encode()).hexdigest()[:12]}"
    )


def psnr(a: Images, b: Images) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each pair of images (n, height, width, 3), in dB, (n,).

    For equal images, the ratio of a difference of one level in one value.
    """
    squares = np.square(a.astype(np.float64) - b).reshape(len(a), -1)
    ratio: NDArray[np.float64] = 10 * np.log10(255**2 / squares.mean(axis=1).clip(1 / squares.shape[1]))
    return ratio
