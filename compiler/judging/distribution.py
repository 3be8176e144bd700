"""Distances between the distributions of two sets of pictures, from their embeddings: CMMD and KID.

Both are squared maximum mean discrepancies (MMD), which need no labels and assume no shape of the distributions:

    MMD²(X, Y) = E k(x, x') + E k(y, y') − 2 E k(x, y)

The estimator is the unbiased one for pairs (Gretton et al., 2012, Lemma 6, equation 4), because picture i before the
edit and picture i after it have the same prompt and seed:

    MMD² = 1 / (n (n − 1)) Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i)]

It is exactly 0 if nothing changed, and it may be slightly negative. Its interval is that of the jackknife over pairs
(Efron and Stein, 1981). All sums are float64 and run in blocks, so that memory grows with n and not with n².
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from erasec.judging.intervals import Interval, Z

Embeddings = NDArray[np.floating]  # (n, d)
Rows = NDArray[np.float64]

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
BLOCK = 512  # rows of a kernel matrix that are computed at once


def cmmd(before: Embeddings, after: Embeddings) -> Interval:
    """CMMD of embeddings (n, d) in pairs (Jayasumana et al., 2024): k(x, y) = exp(−|x − y|² / (2 · SIGMA²)) on unit
    embeddings, times SCALE. The paper's embeddings are those of CLIP ViT-L/14 at 336 pixels; values of other
    embeddings are on another scale."""
    value, low, high = _distance(_unit(before), _unit(after), _gaussian)
    return Interval(SCALE * value, SCALE * low, SCALE * high)


def kid(before: Embeddings, after: Embeddings) -> Interval:
    """KID (Binkowski et al., 2018) of embeddings (n, d) in pairs: k(x, y) = (x·y / d + 1)³.

    Embeddings are scaled to length √d, so that x·y / d is their cosine; the paper's are those of Inception, whose
    values are on another scale. The paper averages over subsets to save time; here all pairs are used.
    """
    size = math.sqrt(before.shape[1])
    return _distance(size * _unit(before), size * _unit(after), _cubic)


def halves(rows: Embeddings, distance: Callable[[Embeddings, Embeddings], Interval]) -> Interval:
    """The distance between two random halves of one set (n, d): what other prompts and seeds alone change."""
    order = np.random.default_rng(0).permutation(len(rows))
    half = len(rows) // 2
    return distance(rows[order[:half]], rows[order[half : 2 * half]])


def _gaussian(x: Rows, y: Rows) -> Rows:
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    kernel: Rows = np.exp(-squares.clip(0) / (2 * SIGMA**2))
    return kernel


def _cubic(x: Rows, y: Rows) -> Rows:
    kernel: Rows = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _unit(rows: Embeddings) -> Rows:
    rows = rows.astype(np.float64)
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _distance(x: Rows, y: Rows, kernel: Callable[[Rows, Rows], Rows]) -> Interval:
    """The unbiased MMD² of pairs, x and y (n, d) with n > 2, and its jackknife interval."""
    n = len(x)
    if x.shape != y.shape or n < 3:
        raise ValueError(f"{x.shape} and {y.shape} are no three pairs of embeddings")
    sums = np.empty(n)  # of the terms of each pair with all others
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        terms = kernel(x[rows], x) + kernel(y[rows], y) - kernel(x[rows], y) - kernel(y[rows], x)
        terms[np.arange(len(terms)), np.arange(start, start + len(terms))] = 0
        sums[rows] = terms.sum(1)
    total = sums.sum()
    value = float(total / (n * (n - 1)))
    without = (total - 2 * sums) / ((n - 1) * (n - 2))  # the estimates that leave out one pair
    half = Z * math.sqrt((n - 1) / n * float(np.square(without - without.mean()).sum()))
    return Interval(value, value - half, value + half)
