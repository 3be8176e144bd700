"""What published protocols count in the pictures of a build, for the text of its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from erasec.base import Judge
    from erasec.judging.evidence import Evidence


def protocol_counts(judge: Judge | None, evidence: Evidence, group: str, label: str) -> list[str]:
    """For each protocol of the judge, its count before and after the edit, in the pictures of a group for a label.
    None without a judge."""
    if judge is None:
        return []
    rows = np.array([item.group == group and item.looked_for == label for item in evidence.questions])
    before, after = judge.protocols(evidence.before[rows], label), judge.protocols(evidence.after[rows], label)
    return [f"{name} {before[name].sum()} to {after[name].sum()}" for name in before]
