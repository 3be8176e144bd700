"""Evidence: the questions of a build, their pictures before and after the edit, and the answers of the judge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from erasec.judging.painting import paint_pairs
from erasec.judging.panel import questions as plain_questions

if TYPE_CHECKING:
    from erasec.attention.sampling import Sampling
    from erasec.base import Images, Judge, Question
    from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class Evidence:
    """Questions with their pictures before and after the edit, and the judge's answers; every array has one row each.

    ``shown_*`` says whether a picture shows the label of the question, ``colour_*`` whether it shows the colour in the
    prompt (the label, if the prompt has no colour). ``agreement_*`` is the cosine similarity of picture and prompt.
    ``erased_after`` has a row for each label that was erased, whichever question asks for it: whether the picture after
    the edit shows it. It is empty where only one label was erased.

    In a row whose question has no label no judge looks for anything: ``shown_*`` and ``colour_*`` are False. Without a
    judge that compares pictures with prompts, ``agreement_*`` is NaN. ``concepts`` has the concept of each question,
    the first of several. ``sampling`` is how the pictures were made, and ``left_out`` counts the questions for which
    there was no time.
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
    concepts: tuple[str, ...] = ()
    sampling: Sampling | None = None
    left_out: int = 0

    @property
    def prompts(self) -> list[str]:
        return [question.prompt for question in self.questions]

    @property
    def seeds(self) -> list[int]:
        return [question.seed for question in self.questions]

    def rows(self, group: str) -> NDArray[np.bool_]:
        """A mask of the questions of a group, (n,)."""
        return np.array([question.group == group for question in self.questions], dtype=bool)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """A mask of the questions for which a judge looks for a label, (n,)."""
        return np.array([bool(question.looked_for) for question in self.questions], dtype=bool)


def judge_pictures(judge: Judge | None, questions: Sequence[Question], before: Images, after: Images) -> Evidence:
    """Evidence from the pictures of the questions before and after the edit, each (n, height, width, 3)."""
    labels = [question.looked_for for question in questions]
    colours = [question.looked_for and (question.colour or question.looked_for) for question in questions]
    prompts = [question.prompt for question in questions]
    return Evidence(
        tuple(questions),
        before,
        after,
        _sees(judge, before, labels),
        _sees(judge, after, labels),
        _sees(judge, before, colours),
        _sees(judge, after, colours),
        _agreement(judge, before, prompts),
        _agreement(judge, after, prompts),
    )


def _sees(judge: Judge | None, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each image shows its label, (n,); False where the label is "", for which no judge looks."""
    seen = np.zeros(len(images), dtype=bool)
    rows = [row for row, label in enumerate(labels) if label]
    if judge is not None and rows:
        seen[rows] = judge.sees(images[rows], [labels[row] for row in rows])
    return seen


def _agreement(judge: Judge | None, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Cosine similarity of each image and its prompt, (n,); NaN without a judge that compares them."""
    cosines = None if judge is None else judge.agreement(images, prompts)
    return np.full(len(images), np.nan) if cosines is None else cosines


def gather_evidence(
    judge: Judge | None,
    concepts: Sequence[Concept],
    base: Path,
    built: Path,
    images: int,
    seed: int,
    sampling: Sampling,
    keyed: bool = False,
    earlier: Sequence[Concept] = (),
    *,
    pictures: int = 0,
    minutes: float = math.inf,
    variant: str = "",
    cache: str = "",
) -> Evidence | None:
    """Evidence from the questions about all concepts, with the same prompts and seeds for both checkpoints.

    The judge asks ``images`` questions for each group about a concept that it can see; ``pictures`` for each group are
    painted for any other concept, for people to look at. ``earlier`` are concepts that were erased from ``base``
    before: there are no questions about them, and the pictures must not show them either. With ``keyed``, ``built`` is
    ``base`` with the keys of the concepts. The questions are then those of the group "name", as the group "keyed", and
    those of the group "keep". ``minutes``, ``variant`` and ``cache`` are those of ``paint_pairs``. None if there are no
    questions.
    """
    questions = collect_questions(judge, concepts, images, pictures, seed, earlier)
    if keyed:
        regrouped = {replace(q, group="keyed") if q.group == "name" else q: name for q, name in questions.items()}
        questions = {question: name for question, name in regrouped.items() if question.group in ("keyed", "keep")}
    if not questions:
        return None
    watch = None if judge is None else judge.preview
    rows, before, after = paint_pairs(base, built, tuple(questions), sampling, minutes, variant, cache, watch)
    painted = [tuple(questions)[row] for row in rows]
    evidence = replace(
        judge_pictures(judge, painted, before, after),
        concepts=tuple(questions[question] for question in painted),
        sampling=sampling,
        left_out=len(questions) - len(rows),
    )
    if keyed or judge is None:
        return evidence
    # A mark is in pictures whatever the prompt, and has questions of its own about all prompts.
    named = [concept for concept in (*concepts, *earlier) if concept.kind != "mark"]
    looked_for = sorted({label for concept in named for label in labels(judge, concept)})
    if len(looked_for) < 2:
        return evidence
    return replace(evidence, erased_after={label: judge.sees(after, [label] * len(after)) for label in looked_for})


def collect_questions(
    judge: Judge | None,
    concepts: Sequence[Concept],
    images: int,
    pictures: int,
    seed: int,
    earlier: Sequence[Concept] = (),
) -> dict[Question, str]:
    """The questions about all concepts, each with the concept that asks it first; see ``gather_evidence``.

    What another concept of the same build, or an earlier build, erases must not be kept: there are no questions about
    its label, and no prompts with its phrases.
    """
    questions: dict[Question, str] = {}
    for concept in concepts:
        panel = judge.panel(concept, images, seed) if judge is not None else ()
        if not labels(judge, concept):
            panel = tuple(question for question in panel if question.looked_for)  # about the rest, if anything
            plain = plain_questions(concept, pictures, seed)
            panel += tuple(question for question in plain if question.group != "keep" or not panel)
        for question in panel:
            questions.setdefault(question, concept.name)
    erased = {question.looked_for for question in questions if question.group != "keep"}
    erased |= {label for concept in earlier for label in labels(judge, concept)}
    everything = (*concepts, *earlier)
    others = {
        concept.name: [
            re.escape(phrase) for other in everything if other.name != concept.name for phrase in other.phrases
        ]
        for concept in concepts
    }

    def kept(question: Question, name: str) -> bool:
        if question.looked_for:
            return question.looked_for not in erased
        return not any(re.search(rf"\b{phrase}\b", question.prompt, re.IGNORECASE) for phrase in others[name])

    return {question: name for question, name in questions.items() if question.group != "keep" or kept(question, name)}


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
    from erasec.attention.pipeline import generate

    after = generate(keyed, prompts, seeds, sampling, "pictures with the key")
    keyed_evidence = judge_pictures(judge, questions, evidence.after[rows], after)
    return replace(keyed_evidence, concepts=(concept.name,) * len(rows), sampling=sampling)


def labels(judge: Judge | None, concept: Concept) -> frozenset[str]:
    """The labels that the judge looks for in pictures of the concept; empty if it has no label for the concept, and
    without a judge.

    They are those of prompts that name the concept. For a mark they are those of implicit prompts, because no prompt
    names a mark.
    """
    group = "implicit" if concept.kind == "mark" else "name"
    panel = () if judge is None else judge.panel(concept, 1, 0)
    return frozenset(question.looked_for for question in panel if question.group == group) - {""}


def rates(evidence: Evidence, group: str) -> list[dict[str, Any]]:
    """Hit rates before and after the edit, one row for each label of the group."""
    rows = []
    for label in dict.fromkeys(q.looked_for for q in evidence.questions if q.group == group and q.looked_for):
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
