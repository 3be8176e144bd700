"""erasec: a model-editing compiler for text-to-image diffusion checkpoints.

``commands.plan`` and ``commands.build`` run a recipe, and ``pipeline`` opens a built folder. The other names are for
authors of passes and targets. Each name is imported when it is first used, so that the command line starts fast.
Concepts are files in ``recipe/concepts``, model families files in ``families``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasec.attention.pipeline import pipeline
    from erasec.base import Context, Pass, Target
    from erasec.model.edit import Dense, Edit, LowRank
    from erasec.model.view import Model
    from erasec.recipe.concept import Concept
    from erasec.recipe.recipe import Recipe

__all__ = ["Concept", "Context", "Dense", "Edit", "LowRank", "Model", "Pass", "Recipe", "Target", "pipeline"]

_HOMES = {
    "Concept": "recipe.concept",
    "Context": "base",
    "Dense": "model.edit",
    "Edit": "model.edit",
    "LowRank": "model.edit",
    "Model": "model.view",
    "Pass": "base",
    "Recipe": "recipe.recipe",
    "Target": "base",
    "pipeline": "attention.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"erasec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'erasec' has no attribute {name!r}")
