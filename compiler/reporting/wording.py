"""Words of the report: explanations of stats, lists, sentences and Markdown. ``format`` has the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from erasec.checkpoint.disk import size
from erasec.errors import words
from erasec.reporting.format import data, duration, number, percent, share

# What each stat of a pass means. A stat that is not in this table is shown under its own name, without explanation.
STATS = {
    "condition": "condition number of the solved matrix: the factor by which it can magnify rounding errors",
    "sigma_min": "smallest singular value of the map on text states: 1 keeps a direction, 0 removes it",
    "sigma_max": "largest singular value of the map on text states: the factor by which it stretches a direction",
    "erased_residual": "distance of erased text states to their anchor after the edit over before: 0 is exact",
    "keep_drift": "relative change of the text states to keep: 0 is unchanged",
    "value_drift": "relative change of the values of the text states to keep: 0 is unchanged",
    "rank": "rank of the change of each weight matrix",
    "rows_erased": "text states that are mapped to the anchor",
    "rows_kept": "text states that are kept",
    "ridge": "regularisation added to the diagonal: a larger value changes the weights less",
    "steps": "training steps",
    "loss_first": "mean loss of the first tenth of the steps",
    "loss_last": "mean loss of the last tenth of the steps",
    "drift": "norm of the change over norm of the weight, all trained tensors together: 0 is unchanged",
    "ratio": "denoising error on pictures of the concept with its name as the prompt over that with no prompt",
    "cosine": "mean cosine of the end tokens of kept prompts before and after: 1 is unchanged",
    "worse": "relative increase of the denoising error on kept pictures",
    "pictures": "training pictures",
    "marked": "training pictures that show the concept",
    "memories": "memories, one for each attention and part",
    "rows": "keys and values in each memory",
    "phrases": "names of the concept that fit into the erasure prompt",
    "parameters": "trained parameters",
    "stopped": "why training ended: 0 after all steps, 1 the goal was reached, 2 rolled back to the last good state",
}


# Where the value of an option comes from. An origin goes before those below it.
ORIGINS = {
    "flag": "by flag",
    "recipe": "from the recipe",
    "model": "from the presets of the model",
    "family": "from the table of the family",
    "class": "defaults of the pass",
}


def by_origin(options: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """The options of a pass in groups with a title: where their values come from. One group without a title if that is
    not known."""
    if not origins:
        return [("", dict(options))] if options else []
    groups = (
        (title, {name: value for name, value in options.items() if origins.get(name) == origin})
        for origin, title in ORIGINS.items()
    )
    return [group for group in groups if group[1]]


def meaning(stat: str) -> str:
    """What a stat of a pass means, "" for an unknown stat. "loss NAME_first" is the first value of the loss NAME."""
    if stat.startswith("loss "):
        stat = f"loss_{stat.rpartition('_')[2]}"
    return STATS.get(stat, "")


def sentence(text: str) -> str:
    """``text`` with a capital letter and a full stop."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def markdown(text: object) -> str:
    """``text`` on one line, escaped so that it is plain text in a Markdown table."""
    line = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(str(text).split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


FILTERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (by_origin, meaning, percent, share, number, data, size, duration, words, sentence, markdown)
}
