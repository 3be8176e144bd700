"""Which judge decides about each concept of a build, and which one a pass may consult while it trains.

For each concept the first judge that can see it decides: one that the recipe names, else that of the model's own
reference world, else the first in the concept's [judge] table whose library and weights are here. The judge that
decides about a concept is never the one that a pass consults about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasec import registry
from erasec.errors import ErasecError, MissingTool, suggestion, words
from erasec.recipe import concept as concept_library
from erasec.recipe.recipe import parse_named_options

if TYPE_CHECKING:
    from erasec.base import Judge
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


@dataclass(frozen=True)
class Selection:
    """The judges of a build.

    ``by_concept`` has the judges that can see each concept, by its name; the first of them decides. ``of_model`` is a
    judge of the model itself, whether it can see the concepts or not; None if no such judge knows the model.
    ``remarks`` say what is missing for concepts that no judge can see.
    """

    by_concept: Mapping[str, tuple[Judge, ...]]
    of_model: Judge | None = None
    remarks: tuple[str, ...] = ()


def select(model: Model, concepts: Sequence[Concept], wanted: Sequence[str] = ()) -> Selection:
    """The judges for pictures of ``model``; ``wanted`` are those that the recipe names, as NAME[:key=value,...].

    Raises ErasecError for a judge in ``wanted`` that can judge neither the model nor one of the concepts, and
    MissingTool if its library or weights are not here.
    """
    judges: dict[str, list[Judge]] = {concept.name: [] for concept in concepts}
    of_model: Judge | None = None
    for text in wanted:
        use = parse_named_options(text, "--judge")
        kind = registry.load_judge(use.name)
        if kind.row is not None:
            for name, judge in _for_concepts(kind, concepts, use.options).items():
                judges[name].append(judge)
            continue
        if use.options:
            raise ErasecError(f"the judge {use.name} has no options", fix=f"--judge {use.name}")
        named = registry.judge_for(model, use.name)
        assert named is not None  # judge_for raises for a named judge
        of_model = of_model or named
        for concept in concepts:
            judges[concept.name] += [named] if can_see(named, concept) else []
    own = registry.judge_for(model)
    missing: dict[str, list[str]] = {}
    for concept in concepts:
        present = judges[concept.name]
        if own is None:
            usable, hint = _from_table(concept, {judge.name for judge in present})
            present += usable
            if hint and not present:
                missing.setdefault(hint, []).append(concept.name)
        elif own.name not in {judge.name for judge in present} and can_see(own, concept):
            present.append(own)
    by_concept = {name: tuple(items) for name, items in judges.items()}
    remarks = tuple(f"{words(names)} could be judged by {hint}" for hint, names in missing.items())
    return Selection(by_concept, of_model or own, remarks)


def world_of(model: Model) -> str:
    """The reference world of the model, which is the one whose judge knows it; "" for a model of none."""
    judges = registry.judges()
    worlds = (world for world in concept_library.worlds() if world in judges)
    return next((world for world in worlds if registry.load_judge(world).for_model(model) is not None), "")


def can_see(judge: Judge, concept: Concept) -> bool:
    """Whether the judge has a label that it looks for in pictures of the concept."""
    return any(question.looked_for for question in judge.panel(concept, 1, 0) if question.group != "keep")


def _for_concepts(kind: type[Judge], concepts: Sequence[Concept], options: Mapping[str, object]) -> dict[str, Judge]:
    """The judge that the user named, for each concept that it can see, by name. Raises its error if it can see none."""
    judges: dict[str, Judge] = {}
    refused: ErasecError | None = None
    for concept in concepts:
        try:
            judge = kind.for_concepts([concept], options, explicit=True)
        except MissingTool:
            raise
        except ErasecError as error:
            refused = refused or error
            continue
        if judge is not None:
            judges[concept.name] = judge
    if concepts and not judges:
        raise refused or ErasecError(f"the judge {kind.name} can see none of the concepts")
    return judges


def _from_table(concept: Concept, present: set[str]) -> tuple[list[Judge], str]:
    """The judges of the concept's [judge] table that can be used here, without those that are ``present``, and how the
    others could be."""
    registered = registry.judges()
    judges, missing = [], []
    for name in concept.judges:
        if name in present:
            continue
        if name not in registered:
            missing.append(f"{name}, which is not registered here ({suggestion(name, registered)})")
            continue
        try:
            judge = registry.load_judge(name).for_concepts([concept])
        except MissingTool as error:
            missing.append(f"{name}: {error.fix}")
            continue
        judges += [judge] if judge is not None else []
    return judges, "; or by ".join(missing)


def tuning_judge(model: Model, concept: Concept, wanted: Sequence[str] = ()) -> Judge | None:
    """A judge that a pass may consult about the concept while it trains: it can locate the concept, and another judge
    decides. None if there is none.

    For a model of a reference world it is that world's second judge; otherwise the first judge after the deciding one
    that can locate the concept.
    """
    if (second := registry.judge_for(model, tuning=True)) is not None:
        return second
    judges = select(model, [concept], wanted).by_concept[concept.name]
    return next((judge for judge in judges[1:] if judge.locates), None)


def no_tuning_judge(model: Model, concept: Concept, wanted: Sequence[str] = ()) -> str:
    """Why ``tuning_judge`` is None, and which judges to give, as the ``why`` of an error."""
    selection = select(model, [concept], wanted)
    judges = selection.by_concept[concept.name]
    nobody = f"no judge can see {concept.name} in the images of {model.name}"
    if not judges:
        return "; ".join((nobody, *selection.remarks))
    deciding = judges[0].name
    if not any(judge.locates for judge in judges):
        return f"{deciding} decides the checks, and no judge here can locate {concept.name}"
    others = [name for name in concept.judges if name != deciding]
    return f"{deciding} decides the checks, so it must not train the pass; another judge has to decide" + (
        f", such as --judge {others[0]}" if others else ""
    )
