"""Whether concepts and edits change anything. What would change nothing is an error that names its concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from erasec.closed_form.token_rows import goal_prompts
from erasec.errors import ErasecError
from erasec.recipe.goals import ANOTHER_GOAL

if TYPE_CHECKING:
    from erasec.base import Pass
    from erasec.model.edit import Edit
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept


def check_goals(concepts: Sequence[Concept], model: Model) -> None:
    """Raise ErasecError for a concept with a phrase that the text encoders read as its goal.

    Whatever the pass, such a phrase stays as it is. An edit of several concepts may hide that, as the others move
    tensors.
    """
    for concept in concepts:
        for phrase in concept.phrases:
            prompts, goals = concept.prompts([phrase]), goal_prompts(concept, [phrase])
            if all(model.same_tokens([prompt.text for prompt in prompts], [goal.text for goal in goals])):
                raise ErasecError(
                    f"the concept {concept.name} becomes itself",
                    why=f"the text encoders read its phrase {phrase!r} and the goal {concept.goal(phrase)!r} as the "
                    "same tokens",
                    fix=ANOTHER_GOAL,
                )


def check_change(step: Pass, before: Model, after: Model, edit: Edit) -> None:
    """Raise ErasecError for an edit that moves no tensor and carries nothing else. As a rule only one tensor is
    merged."""
    import torch

    if edit.memories or edit.tokens or edit.negative or edit.secret:
        return
    if not any(not torch.equal(before.merged_weight(site), after.merged_weight(site)) for site in edit.deltas):
        raise ErasecError(
            f"pass {step.name} changes nothing for {', '.join(edit.concepts)}",
            why="every tensor that it edits stays as it was, to the last bit",
            fix="name a concept to erase, and an anchor that is not the concept itself; or give the pass stronger "
            "options",
        )
