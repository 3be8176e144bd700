"""Formats numbers for readers: rates, shares, sizes, durations. ``wording`` has the words."""

from __future__ import annotations

import math
import re

from markupsafe import Markup, escape


def percent(rate: float) -> str:
    """A rate in [0, 1] as a percentage. A rate that is not exactly 0 or 1 never prints as 0 % or 100 %."""
    if not math.isfinite(rate):
        return number(rate)
    if 0 < rate < 0.0005 or 0.9995 < rate < 1:
        return "under 0.1\u00a0%" if rate < 0.5 else "over 99.9\u00a0%"
    return f"{100 * rate:.1f}".removesuffix(".0") + "\u00a0%"


def share(part: float) -> str:
    """A fraction as a percentage with three significant digits, however small it is."""
    return number(100 * float(f"{part:.3g}")) + ("\u00a0%" if math.isfinite(part) else "")


def number(value: float) -> str:
    """A number with four significant digits; very small and very large ones as ``1.2 × 10^-7``."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "−infinite")
    digits, _, power = f"{value:.2e}".partition("e")
    text = f"{float(digits):g} × 10^{int(power)}"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text.replace("-", "−")


def data(value: float, text: str) -> Markup:
    """An HTML element that shows ``text`` to readers and has the exact ``value`` for programs."""
    content = Markup(re.sub(r"\^(\S+)", r"<sup>\1</sup>", str(escape(text))))
    return Markup('<data value="{}">{}</data>').format(float(value) if isinstance(value, float) else value, content)


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds from one minute on."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def about(least: float, most: float) -> str:
    """A range of seconds in the unit that suits its end, with one or two digits: "about 4 to 9 minutes"."""
    unit, name = (1, "s") if most < 90 else (60, "minutes") if most < 5400 else (3600, "hours")
    shares = [value / unit for value in (least, most)]
    first, last = (float(f"{share:.2g}") if share >= 1 else round(share, 1) for share in shares)
    if first == last:
        return f"about {last:g} {name}" if last else f"less than 0.1 {name}"
    return f"about {first:g} to {last:g} {name}"
