"""Losses of the reference worlds' trainer that are more than one line."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

LEAST_DEVIATION = 0.5  # of each dimension of the text states, over a batch


def spread_loss(states: Tensor) -> Tensor:
    """The variance and covariance terms of VICReg (Bardes et al., 2022, equations 1 and 3) on states (n, d).

    A contrastive loss alone is content with a few dimensions. Then every name is nearly a sum of others, and no edit
    could change one of them alone.
    """
    centred = states - states.mean(0)
    deviation = (centred.pow(2).mean(0) + 1e-4).sqrt()
    correlation = (centred / deviation).T @ (centred / deviation) / len(states)
    together = correlation.pow(2).sum() - correlation.diagonal().pow(2).sum()
    spread: Tensor = F.relu(LEAST_DEVIATION - deviation).mean() / LEAST_DEVIATION + together / states.shape[1]
    return spread
