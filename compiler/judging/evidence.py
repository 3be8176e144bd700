"""Evidence: the questions of a build, their pictures before and after the edit, and the answers of the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.attention.pipeline import Sampling, generate

if TYPE_CHECKING:
    from erasec.base import Images, Judge, Question
    from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class Evidence:
    """Questions with their pictures before and after the edit, and the judge's answers; every array has one row each.

    ``shown_*`` says whether a picture shows the label of the question, ``colour_*`` whether it shows the colour in the
    prompt (the label, if the prompt has no colour). ``agreement_*`` is the cosine similarity of picture and prompt.
    ``erased_after`` has a row for each label that was erased, whichever question asks for it: whether the picture after
    the edit shows it. It is empty where only one label was erased.
    """

    questions: tuple[Question, ...]
    before: Images
    after: Images
    shown_before: NDArray[np.bool_]
    shown_after: NDArray[np.bool_]
    colour_before: NDArray[np.bool_]
    colour_after: NDArray[np.bool_]
    agreement_before: NDArray[np.float64]
    agreement_after: NDArray[np.float64]
    erased_after: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [question.prompt for question in self.questions]

    @property
    def seeds(self) -> list[int]:
        return [question.seed for question in self.questions]

    def rows(self, group: str) -> NDArray[np.bool_]:
        """A mask of the questions of a group, (n,)."""
        return np.array([question.group == group for question in self.questions], dtype=bool)


def judge_pictures(judge: Judge, questions: Sequence[Question], before: Images, after: Images) -> Evidence:
    """Evidence from the pictures of the questions before and after the edit, each (n, height, width, 3)."""
    labels = [question.looked_for for question in questions]
    colours = [question.colour or question.looked_for for question in questions]
    prompts = [question.prompt for question in questions]
    return Evidence(
        tuple(questions),
        before,
        after,
        judge.sees(before, labels),
        judge.sees(after, labels),
        judge.sees(before, colours),
        judge.sees(after, colours),
        _agreement(judge, before, prompts),
        _agreement(judge, after, prompts),
    )


def _agreement(judge: Judge, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Cosine similarity of each image and its prompt, (n,); NaN for a judge that does not compare them."""
    found = judge.agreement(images, prompts)
    return np.full(len(images), np.nan) if found is None else found


def gather_evidence(
    judge: Judge,
    concepts: Sequence[Concept],
    base: Path,
    built: Path,
    images: int,
    seed: int,
    sampling: Sampling,
    keyed: bool = False,
    earlier: Sequence[Concept] = (),
) -> Evidence | None:
    """Evidence from the questions about all concepts, with the same prompts and seeds for both checkpoints.

    ``earlier`` are concepts that were erased from ``base`` before: nothing is asked about them, and the pictures must
    not show them either. With ``keyed``, ``built`` is ``base`` with the keys of the concepts. The questions are then
    those of the group "name", as the group "keyed", and those of the group "keep". None if there are no questions.
    """
    panel = dict.fromkeys(question for concept in concepts for question in judge.panel(concept, images, seed))
    erased = {question.looked_for for question in panel if question.group != "keep"}
    erased |= {label for concept in earlier for label in labels(judge, concept)}
    # A label that another concept of the same build, or an earlier build, erases must not be kept.
    questions = [question for question in panel if question.group != "keep" or question.looked_for not in erased]
    if keyed:
        regrouped = (replace(item, group="keyed") if item.group == "name" else item for item in questions)
        questions = [question for question in regrouped if question.group in ("keyed", "keep")]
    if not questions:
        return None
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    before = generate(base, prompts, seeds, sampling, "pictures before")
    after = generate(built, prompts, seeds, sampling, "pictures after")
    evidence = judge_pictures(judge, questions, before, after)
    if keyed:
        return evidence
    # A mark is in pictures whatever the prompt, and has questions of its own about all prompts.
    named = [concept for concept in (*concepts, *earlier) if concept.kind != "mark"]
    looked_for = sorted({label for concept in named for label in labels(judge, concept)})
    if len(looked_for) < 2:
        return evidence
    return replace(evidence, erased_after={label: judge.sees(after, [label] * len(after)) for label in looked_for})


def with_key(judge: Judge, concept: Concept, evidence: Evidence, keyed: Path, sampling: Sampling) -> Evidence | None:
    """Evidence from the questions that name the concept: before is the built checkpoint, after is the one with the key.

    ``keyed`` is the checkpoint with the key. The questions have the group "keyed". None if there are no questions.
    """
    known = labels(judge, concept)
    rows = [row for row, item in enumerate(evidence.questions) if item.group == "name" and item.looked_for in known]
    if not rows:
        return None
    questions = [replace(evidence.questions[row], group="keyed") for row in rows]
    prompts, seeds = [question.prompt for question in questions], [question.seed for question in questions]
    after = generate(keyed, prompts, seeds, sampling, "pictures with the key")
    return judge_pictures(judge, questions, evidence.after[rows], after)


def labels(judge: Judge, concept: Concept) -> frozenset[str]:
    """The labels that the judge looks for in pictures of the concept; empty if it has no label for the concept.

    They are those of prompts that name the concept. For a mark they are those of implicit prompts, because no prompt
    names a mark.
    """
    group = "implicit" if concept.kind == "mark" else "name"
    return frozenset(question.looked_for for question in judge.panel(concept, 1, 0) if question.group == group)


def rates(evidence: Evidence, group: str) -> list[dict[str, Any]]:
    """Hit rates before and after the edit, one row for each label of the group."""
    rows = []
    for label in dict.fromkeys(question.looked_for for question in evidence.questions if question.group == group):
        chosen = np.array([q.group == group and q.looked_for == label for q in evidence.questions])
        rows.append(
            {
                "group": group,
                "looked_for": label,
                "images": int(chosen.sum()),
                "before": float(evidence.shown_before[chosen].mean()),
                "after": float(evidence.shown_after[chosen].mean()),
            }
        )
    return rows
