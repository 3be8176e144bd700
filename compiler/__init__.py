"""erasec: a model-editing compiler for text-to-image diffusion checkpoints.

The modules ``plan`` and ``build`` run a recipe; the names below are what passes and targets are written with. They are
imported when first used, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erasec.base import Context, Pass, Target
    from erasec.concept import Concept
    from erasec.edit import Dense, Edit, LowRank
    from erasec.model import Model
    from erasec.recipe import Recipe

__all__ = ["Concept", "Context", "Dense", "Edit", "LowRank", "Model", "Pass", "Recipe", "Target"]

_HOMES = {
    "Concept": "concept",
    "Context": "base",
    "Dense": "edit",
    "Edit": "edit",
    "LowRank": "edit",
    "Model": "model",
    "Pass": "base",
    "Recipe": "recipe",
    "Target": "base",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"erasec.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'erasec' has no attribute {name!r}")
