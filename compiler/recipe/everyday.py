"""Captions of everyday words, which closed-form passes can keep: ``prior=everyday``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from erasec.documents import read_toml
from erasec.recipe.concept import Concept

NAME = "everyday"
FILE = Path(str(resources.files("erasec.recipe"))) / "everyday.toml"


@cache
def captions() -> tuple[str, ...]:
    """Every word of ``everyday.toml`` in every template of its group, each caption once."""
    texts: dict[str, None] = {}
    for name, group in read_toml(FILE, "the everyday words").items():
        wording = Concept(name=name, erase=tuple(group["words"]), templates=tuple(group["templates"]))
        texts |= dict.fromkeys(prompt.text for prompt in wording.prompts(wording.erase))
    return tuple(texts)
