"""The base of judges that look at pictures of any model, for concepts whose [judge] table says what to look for."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from erasec.base import Judge
from erasec.errors import MissingTool
from erasec.judging.panel import questions
from erasec.options import configure

if TYPE_CHECKING:
    from erasec.base import Images, Question
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


class PictureJudge(Judge):
    """A judge of concepts. Its label for a concept is the name of the concept.

    ``settings`` is the dataclass of the options of ``--judge NAME:key=value``, and ``row`` that of the options in the
    [judge] table of a concept; both are declared with ``erasec.options.options``. ``rows`` has what is looked for, by
    the name of the concept.
    """

    row: ClassVar[type]
    settings: ClassVar[type]

    def __init__(self, settings: Any, rows: Mapping[str, Any]) -> None:
        self.options, self.rows = settings, dict(rows)

    @classmethod
    def for_model(cls, model: Model, tuning: bool = False) -> Self | None:
        return None  # it knows concepts, not models

    @classmethod
    def for_concepts(
        cls, concepts: Sequence[Concept], options: Mapping[str, object] | None = None, explicit: bool = False
    ) -> Self | None:
        settings: Any = configure(cls.settings, options or {}, cls.name)
        rows = {}
        for concept in concepts:
            given = concept.judges.get(cls.name)
            if given is None and not explicit:
                continue
            row: Any = configure(cls.row, given or {}, f"[judge] {cls.name} of {concept.name}")
            rows[concept.name] = cls.look_for(concept, row)
        if not rows:
            return None
        judge = cls(settings, rows)
        if explicit:
            judge.fetch()
        if command := judge.missing():
            why = "its library or weights are not here"
            raise MissingTool(f"the judge {cls.name} cannot be used", why=why, fix=command)
        judge.check()
        return judge

    @classmethod
    def needs(cls) -> str:
        return cls(configure(cls.settings, {}, cls.name), {}).missing()

    @classmethod
    @abstractmethod
    def look_for(cls, concept: Concept, row: Any) -> Any:
        """What the judge looks for in pictures of the concept, as a dataclass, from its row in the [judge] table.
        Raises ErasecError if the row says too little."""

    @abstractmethod
    def missing(self) -> str:
        """The command that brings the library or the weights; "" if they are here."""

    def fetch(self) -> None:
        """Fetch weights that are missing and that a hub has: the user named the judge. Raises ErasecError. By default
        there is nothing to fetch."""
        return

    def check(self) -> None:
        """Raise ErasecError if the weights do not fit what is looked for. Reads no weights. By default they fit."""
        return

    @property
    @abstractmethod
    def weights(self) -> str:
        """sha256 of the weights."""

    @property
    def digest(self) -> str:
        rows = {name: asdict(row) for name, row in self.rows.items()}
        content = [type(self).__name__, self.weights, asdict(self.options), rows]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def panel(self, concept: Concept, images: int, seed: int) -> tuple[Question, ...]:
        return questions(concept, images, seed, concept.name) if concept.name in self.rows else ()

    def sees(self, images: Images, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each image shows its label; a label that the judge does not look for is in no image."""
        seen = np.zeros(len(images), dtype=bool)
        for label in self.rows.keys() & set(labels):
            rows = np.flatnonzero(np.array(labels) == label)
            seen[rows] = self.shows(images[rows], self.rows[label])
        return seen

    @abstractmethod
    def shows(self, images: Images, row: Any) -> NDArray[np.bool_]:
        """Whether each image shows what ``row`` looks for, (n,)."""

    @property
    def compares(self) -> bool:
        return type(self).agreement is not PictureJudge.agreement

    def agreement(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64] | None:
        return None


class Remembered:
    """The outputs of a network for pictures. Each picture is run once: several questions are about the same pictures.

    ``run`` maps at most ``batch`` images (n, height, width, 3) to one array for each.
    """

    def __init__(self, run: Callable[[Images], Iterable[NDArray[Any]]], batch: int) -> None:
        self._run, self._batch = run, batch
        self._known: dict[bytes, NDArray[Any]] = {}

    def __call__(self, images: Images) -> list[NDArray[Any]]:
        keys = [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in images]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        todo = list(new)
        for start in range(0, len(todo), self._batch):
            part = todo[start : start + self._batch]
            outputs = self._run(images[[new[key] for key in part]])
            self._known.update(zip(part, outputs, strict=True))
        return [self._known[key] for key in keys]
