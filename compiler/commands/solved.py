"""Edits in the store: what a pass solved or trained for the same model, concepts and options is not made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from erasec import registry
from erasec.base import Pass
from erasec.checkpoint import store
from erasec.checkpoint.inputs import LIBRARIES, code_digest, file_digests, source_digest, versions
from erasec.errors import ErasecError
from erasec.judging import picture_cache
from erasec.model import edit_file
from erasec.training.base import TrainingContext
from erasec.training.processes import process_count

if TYPE_CHECKING:
    from erasec.base import Context
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept

KIND = "edits"
EDITS, REST = "edits.edit.safetensors", "rest.json"  # REST is what an edit file leaves out
OPTIONAL = ("bitsandbytes", "nudenet", "onnxruntime")  # which decide what a pass computes where it uses them


class Solver:
    """Runs passes one after the other, each on the result of those before it, and stores what they made.

    What two commands would solve alike is taken from the store; with ``fresh``, everything is solved anew. Edits with a
    secret are never stored, nor those of passes that learn from a judge in a local file.
    """

    def __init__(self, model: Model, fresh: bool = False) -> None:
        # The processes of one training must agree on what is trained, and each may have a store of its own.
        self.used = process_count() < 2
        self.fresh = fresh
        self.history = picture_cache.identity(model) if self.used else ""

    def solve(
        self, step: Pass, model: Model, concepts: Sequence[Concept], context: Context
    ) -> Iterator[tuple[Edit, bool]]:
        """The edits of ``step.solve_all``, each with whether it is from the store."""
        each = type(step).solve_all is Pass.solve_all  # one concept after the other, each with an edit of its own
        for group in [[concept] for concept in concepts] if each else [list(concepts)]:
            key = self._key(step, group, context)
            edits = _load(key) if key and not self.fresh else None
            stored = edits is not None
            made = []
            for edit in edits or step.solve_all(model, group, context):
                model = model.with_edit(edit)
                made.append(edit)
                yield edit, stored
            known = key and not any(edit.secret for edit in made)
            if known and not stored:
                _save(key, made, model)
            # What is solved on an edit that is not known by its key is not known either.
            self.history = hashlib.sha256(f"{self.history} {key}".encode()).hexdigest() if known else ""

    def _key(self, step: Pass, concepts: Sequence[Concept], context: Context) -> str:
        """A digest of everything that decides the edits of ``step``; "" where that is not known."""
        local = any(os.sep in judge or ".py" in judge for judge in context.judges)
        if not self.used or local or not self.history:
            return ""
        options = asdict(step)  # type: ignore[call-overload]
        measures = context.measures if isinstance(context, TrainingContext) else None
        facts = [
            self.history,
            [step.name, step.version, options, file_digests(options.values()), source_digest(type(step))],
            [concept.model_dump(mode="json") for concept in concepts],
            [context.device.partition(":")[0], context.seed, context.judges, context.side],
            asdict(measures) if measures else None,
            code_digest(),
            versions((*LIBRARIES, *OPTIONAL)),
            registry.distributions(),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _load(key: str) -> list[Edit] | None:
    with store.unusable_is_noted():
        if folder := store.read_folder(KIND, key):
            try:
                rest = json.loads((folder / REST).read_text(encoding="utf-8"))
                edits, _ = edit_file.read_edits(folder / EDITS)
            except ErasecError:  # a NaN, which an edit file does not hold
                return None
            return [
                replace(
                    edit,
                    curves=own["curves"],
                    params={name: edit.params[name] for name in own["params"]},
                    stats={name: edit.stats[name] for name in own["stats"]},
                )
                for edit, own in zip(edits, rest, strict=True)
            ]
    return None


def _save(key: str, edits: Sequence[Edit], model: Model) -> None:
    """Store ``edits``, after which the model is ``model``."""

    def fill(folder: Path) -> None:
        edit_file.write_edits(folder / EDITS, edits, model.base_record())
        rest = [
            {
                "curves": {name: list(values) for name, values in edit.curves.items()},
                "params": list(edit.params),  # edit files sort them
                "stats": list(edit.stats),
            }
            for edit in edits
        ]
        (folder / REST).write_text(json.dumps(rest), encoding="utf-8")

    with store.unusable_is_noted():
        store.write_folder(KIND, key, fill, replace=True)
