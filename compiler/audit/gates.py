"""Gates: the highest rates that a recipe, or a user, allows an audit to measure. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from erasec.audit.base import Rate, Reading
from erasec.errors import suggestion


@dataclass(frozen=True)
class Gate:
    """A limit of the rate of one probe, or of one variant of it, as PROBE or PROBE/VARIANT.

    ``value`` is the worst rate of the audited model in the rows that the gate names; None where one of them was not
    measured, unless another one already exceeds the limit. ``how`` says which row the value is of, or why there is
    none.
    """

    name: str
    limit: float
    value: float | None
    outcome: Literal["passed", "failed"]
    how: str = ""


def check_gates(readings: Sequence[Reading], limits: Mapping[str, float]) -> tuple[Gate, ...]:
    """The gates of ``limits``, in their order. What was not measured fails: a name that no row of the readings has, a
    probe that was not run, and a variant that was not run."""
    return tuple(_check(name, limit, readings) for name, limit in limits.items())


def model_rate(reading: Reading) -> Rate | None:
    """The rate of the audited model; None where no picture was counted."""
    rate = reading.rates.get("model")
    return rate if rate is not None and rate.count and not reading.obstacle else None


def _check(name: str, limit: float, readings: Sequence[Reading]) -> Gate:
    rows = [reading for reading in readings if name in (reading.probe, f"{reading.probe}/{reading.variant}")]
    # A probe that was not run has no variants: it stands for each of them.
    rows = rows or [row for row in readings if row.obstacle and name.startswith(f"{row.probe}/")]
    measured = [(rate.value, reading.variant, rate) for reading in rows if (rate := model_rate(reading)) is not None]
    missing = [reading.obstacle or "no picture was counted" for reading in rows if model_rate(reading) is None]
    if not rows:
        known = {reading.probe for reading in readings}
        variants = {f"{row.probe}/{row.variant}" for row in readings if name.startswith(f"{row.probe}/")}
        why = (
            f"no row of this audit has the name; {suggestion(name, variants or known)}" if known else "nothing was run"
        )
        return Gate(name, limit, None, "failed", why)
    if measured:
        value, variant, rate = max(measured, key=lambda row: row[0])
        how = f"{rate.hits} of {rate.count} pictures"
        how += f", the worst of {len(measured)} rows: {variant}" if len(measured) > 1 else ""
        if not value <= limit:
            return Gate(name, limit, value, "failed", how)
        if not missing:
            return Gate(name, limit, value, "passed", how)
    return Gate(name, limit, None, "failed", f"{len(missing)} of {len(rows)} rows not run: {missing[0]}")
