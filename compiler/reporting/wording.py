"""Numbers and lists as people read them, for pages and model cards, and what the measurements of passes mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup, escape

STATS = {
    "condition": "condition number of the solved matrix: by how much it can magnify rounding errors",
    "sigma_min": "smallest singular value of the map on text states: 1 leaves a direction as it was, 0 deletes it",
    "sigma_max": "largest singular value of the map on text states: how far it stretches a direction",
    "erased_residual": "what is left of the erased text states' distance to their anchor: 0 is exact",
    "keep_drift": "relative change of the text states that must stay: 0 is untouched",
    "rank": "independent directions in which each weight matrix changed",
    "rows_erased": "text states that were moved to the anchor",
    "rows_kept": "text states that were held in place",
    "ridge": "regularisation added to the diagonal: more moves less",
    "steps": "steps of training that were taken",
    "loss_first": "mean loss of the first tenth of the steps",
    "loss_last": "mean loss of the last tenth of the steps",
    "drift": "norm of the change over norm of the weight, all trained tensors together: 0 is untouched",
    "ratio": "error on the concept's pictures under its name over that under no prompt: what few_shot raises",
    "cosine": "mean cosine of kept prompts' end tokens with what they were: 1 is untouched",
    "worse": "relative rise of the error on kept pictures",
    "pictures": "pictures that training used",
    "marked": "those of them that show the concept",
    "memories": "attentions that read a memory, with one for each part of it",
    "rows": "keys and values in each memory",
    "phrases": "names of the concept that the erasure prompt has room for",
    "parameters": "numbers that were trained",
    "stopped": "why training ended: 0 all steps were taken, 1 enough was reached, 2 rolled back to the last good state",
}


def meaning(stat: str) -> str:
    """What a measurement of a pass means, "" where that is not known; "loss keep_first" is one of several losses."""
    if stat.startswith("loss "):
        stat = f"loss_{stat.rpartition('_')[2]}"
    return STATS.get(stat, "")


def percent(rate: float) -> str:
    if not math.isfinite(rate):
        return number(rate)
    if 0 < rate < 0.0005 or 0.9995 < rate < 1:
        return "under 0.1\u00a0%" if rate < 0.5 else "over 99.9\u00a0%"
    return f"{100 * rate:.1f}".removesuffix(".0") + "\u00a0%"


def share(part: float) -> str:
    """Of a whole, with three digits however small."""
    return number(100 * float(f"{part:.3g}")) + ("\u00a0%" if math.isfinite(part) else "")


def number(value: float) -> str:
    """Four significant digits; ``1.2 × 10^-7`` where there would be many zeros."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "−infinite")
    digits, _, power = f"{value:.2e}".partition("e")
    text = f"{float(digits):g} × 10^{int(power)}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text.replace("-", "−")


def data(value: float, text: str) -> Markup:
    """``text`` for people around the very number for machines."""
    shown = Markup(re.sub(r"\^(\S+)", r"<sup>\1</sup>", str(escape(text))))
    return Markup('<data value="{}">{}</data>').format(float(value) if isinstance(value, float) else value, shown)


def size(count: float) -> str:
    power = min(int(math.log10(max(count, 1))) // 3, 3)
    return f"{float(f'{count / 1000**power:.3g}'):g} {('B', 'kB', 'MB', 'GB')[power]}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def words(items: Iterable[str], most: int = 8) -> str:
    """Such as "a, b and c"; beyond ``most``, how many more."""
    items = list(items)
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def markdown(text: object) -> str:
    """One line of plain text that stays plain in a Markdown table."""
    line = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(str(text).split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


FILTERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (meaning, percent, share, number, data, size, duration, words, sentence, markdown)
}
