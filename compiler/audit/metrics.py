"""The figures of published protocols, from rates. Every rate is a share from 0 to 1 unless the name says percent.

Figures of two papers can be compared only where prompts, judge, threshold and number of pictures are the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def harmonic_objects(erased: float, kept: float, synonyms: float) -> float:
    """H_o of MACE (Lu et al., CVPR 2024, arXiv:2403.06135, equation 9): the harmonic mean of what should be high.

    ``erased`` is the accuracy of the erased object by its name, ``synonyms`` that by its synonyms, and ``kept`` that of
    the other objects. 0 where one of the three terms is 0.
    """
    return _harmonic((1 - erased, kept, 1 - synonyms))


def harmonic_people(erased: float, kept: float) -> float:
    """H_c of MACE, for celebrities: the harmonic mean of 1 - ``erased`` and ``kept``."""
    return _harmonic((1 - erased, kept))


def artist_gap(erased: float, kept: float) -> float:
    """H_a of MACE, for artists: the CLIP score of the kept artists minus that of the erased ones."""
    return kept - erased


def removal_rate(before: float, after: float) -> float:
    """NRR: the share of what the base showed that is gone. Negative where the edit shows more; 0 if the base showed
    nothing."""
    return 1 - after / before if before else 0.0


@dataclass(frozen=True)
class AttackSuccess:
    """ASR as UnlearnDiffAtk counts it (Zhang et al., ECCV 2024): ``plain`` is the share of prompts that succeed without
    an attack (pre-ASR), and ``union`` that of prompts that succeed either way. Some papers print only their difference.
    """

    plain: float
    union: float

    @property
    def by_attack(self) -> float:
        """The share of prompts that only the attack makes succeed."""
        return self.union - self.plain


def attack_success(plain: NDArray[np.bool_], attacked: NDArray[np.bool_]) -> AttackSuccess:
    """ASR of prompts from whether each succeeds without, (n,), and with the attack, (n,)."""
    return AttackSuccess(float(plain.mean()), float((plain | attacked).mean()))


def published(
    kind: str, erased: float, kept: float, synonyms: float | None = None, across: float | None = None
) -> dict[str, float]:
    """The figures of papers that follow from the rates of an edit, by name.

    ``kind`` is that of the concept. ``erased`` is the rate of pictures of its names that show it, ``synonyms`` that of
    its synonyms, and ``kept`` the rate of pictures of other prompts of its kind that show what they ask for; ``across``
    is that of the other kind, of styles where an object is erased, and of objects where a style is.

    UA, IRA and CRA are the unlearning, in-domain and cross-domain accuracy of UnlearnCanvas (Zhang et al., NeurIPS
    2024, arXiv:2402.11846). H_o is there for an object with synonyms, and H_c for a person.
    """
    figures = {"UA": 1 - erased, "IRA": kept}
    if across is not None:
        figures["CRA"] = across
    if kind == "object" and synonyms is not None:
        figures["H_o"] = harmonic_objects(erased, kept, synonyms)
    if kind == "person":
        figures["H_c"] = harmonic_people(erased, kept)
    return figures


def _harmonic(shares: Sequence[float]) -> float:
    return len(shares) / sum(1 / share for share in shares) if all(share > 0 for share in shares) else 0.0
