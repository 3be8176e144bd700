"""The judge of a build: one judge, or a jury of which each member decides about its own concepts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from erasec.base import Judge
from erasec.selection import select

if TYPE_CHECKING:
    from erasec.base import Images, Question
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


def judge_of_build(
    model: Model, concepts: Sequence[Concept], wanted: Sequence[str] = ()
) -> tuple[Judge | None, tuple[str, ...]]:
    """The judge that decides about pictures of ``model``, None if there is none, and what is missing for the concepts
    that it cannot see. ``wanted`` are the judges that the recipe names. Raises ErasecError as ``select`` does."""
    selection = select(model, concepts, wanted)
    members = {name: judges[0] for name, judges in selection.by_concept.items() if judges}
    deciding = _different((*members.values(), selection.of_model))
    compare: Judge | None = None
    if deciding and not any(judge.compares for judge in deciding):
        others = (judge for judges in selection.by_concept.values() for judge in judges[1:])
        # A judge with boxes may be consulted by a pass.
        compare = next((judge for judge in others if judge.compares and not judge.locates), None)
    if len(deciding) < 2 and compare is None:
        return next(iter(deciding), None), selection.remarks
    return Jury(members, concepts, selection.of_model, compare), selection.remarks


def _different(judges: Iterable[Judge | None]) -> tuple[Judge, ...]:
    """The judges, each once, in their order."""
    return tuple({id(judge): judge for judge in judges if judge is not None}.values())


class Jury(Judge):
    """Several judges as one: ``members`` decide by the name of the concept, ``of_model`` about everything else.

    ``compare`` decides about no concept. It compares pictures with prompts, where none of the others can.
    """

    name: ClassVar[str] = "jury"
    summary: ClassVar[str] = "several judges, each for its own concepts"

    def __init__(
        self,
        members: Mapping[str, Judge],
        concepts: Sequence[Concept],
        of_model: Judge | None = None,
        compare: Judge | None = None,
    ) -> None:
        self.members, self.of_model, self.compare = dict(members), of_model, compare
        self._by_label: dict[str, Judge] = {}
        for concept in concepts:
            if (judge := self.members.get(concept.name)) is None:
                continue
            for question in judge.panel(concept, 1, 0):
                if question.group != "keep" and question.looked_for:
                    self._by_label.setdefault(question.looked_for, judge)

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Self | None:
        return None  # `judge_of_build` makes it

    @property
    def judges(self) -> tuple[Judge, ...]:
        """The different judges, in the order of the concepts."""
        return _different((*self.members.values(), self.of_model, self.compare))

    @property
    def title(self) -> str:
        return "; ".join(dict.fromkeys(judge.title for judge in self.judges))

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(judge.digest for judge in self.judges).encode()).hexdigest()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        judge = self.members.get(concept.name, self.of_model)
        return judge.panel(concept, images, seed) if judge else ()

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each image shows its label. A label that no judge looks for, such as "", is in no image."""
        seen = np.zeros(len(images), dtype=bool)
        for label in dict.fromkeys(labels):
            judge = self._by_label.get(label, self.of_model if label else None)
            if judge is not None:
                rows = np.flatnonzero(np.array(labels) == label)
                seen[rows] = judge.sees(images[rows], [label] * len(rows))
        return seen

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64] | None:
        """That of the first judge that can compare pictures with prompts."""
        answers = (judge.agreement(images, prompts) for judge in self.judges)
        return next((answer for answer in answers if answer is not None), None)

    def embed(self, images: Images) -> NDArray[np.floating] | None:
        """Those of the first judge that has embeddings."""
        return next((rows for judge in self.judges if (rows := judge.embed(images)) is not None), None)

    def preview(self, images: Images) -> None:
        for judge in self.judges:
            judge.preview(images)

    def protocols(self, images: Images, label: str) -> Mapping[str, NDArray[np.int64]]:
        judge = self._by_label.get(label)
        return judge.protocols(images, label) if judge else {}

    @property
    def everyday(self) -> bool:  # type: ignore[override]
        """Whether no member is the judge of a synthetic world, whose models know nothing else."""
        return all(judge.everyday for judge in self.judges)

    @property
    def compares(self) -> bool:
        return any(judge.compares for judge in self.judges)

    @property
    def locates(self) -> bool:
        return any(judge.locates for judge in self.judges)

    def boxes(self, images: Images, label: str) -> NDArray[np.int64]:
        judge = self._by_label.get(label, self.of_model)
        return judge.boxes(images, label) if judge else super().boxes(images, label)
