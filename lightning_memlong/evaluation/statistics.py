"""Intervals: how far a result would move if other documents had been drawn."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, norm

LEVEL = 0.95
FEWEST_DOCUMENTS = 5
"""With fewer, windows are drawn instead of documents, and the report says so."""


class Ratio(NamedTuple):
    """A value and its interval, 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}, {self.low:.3f}..{self.high:.3f}"


def wilson(share: float, count: int) -> Ratio:
    """A share of so many with its Wilson interval; of what is partly right, the share may be of no whole number.

    (``scipy.stats.binomtest`` has it for whole numbers alone.)
    """
    z = float(norm.ppf((1 + LEVEL) / 2))
    middle, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + sign * width) / (1 + z**2 / count) for sign in (-1, 1))
    return Ratio(share, min(share, max(0.0, low)), max(share, min(1.0, high)))  # as far as rounding leaves it


def bootstrap_groups(documents: Sequence[str], windows: Sequence[int]) -> tuple[np.ndarray, str]:
    """Which measurements are drawn together, as a number each, and what that is called."""
    names = list(dict.fromkeys(documents))
    if len(names) >= FEWEST_DOCUMENTS:
        return np.array([names.index(d) for d in documents]), "documents"
    places = list(dict.fromkeys(zip(documents, windows, strict=True)))
    return np.array([places.index(p) for p in zip(documents, windows, strict=True)]), "windows"


def weighted_mean(totals: np.ndarray, weights: np.ndarray, groups: np.ndarray, seed: int = 0) -> Ratio:
    """Sum of totals (N,) by sum of weights (N,), with a bootstrap interval over groups (N,): what is drawn together."""
    total, weight = (np.bincount(groups, weights=values.astype(float)) for values in (totals, weights))
    value = float(total.sum() / weight.sum())
    if len(total) < 2:
        return Ratio(value, float("nan"), float("nan"))
    found = bootstrap(
        (total, weight),
        lambda t, w, axis=-1: t.sum(axis) / w.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=2000, confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    interval = found.confidence_interval
    return Ratio(value, float(interval.low), float(interval.high))


def paired_ratio(nll: np.ndarray, other: np.ndarray, tokens: np.ndarray, groups: np.ndarray, seed: int = 0) -> Ratio:
    """Perplexity by another perplexity on the same tokens, with a paired bootstrap interval over groups.

    Args:
        nll: (N,) summed losses of each measurement.
        other: (N,) those it is held against.
        tokens: (N,) tokens of each.
        groups: (N,) what is drawn together.
        seed: Of the draws.
    """
    return Ratio(*np.exp(weighted_mean(nll - other, tokens, groups, seed)).tolist())


def mean_interval(values: np.ndarray) -> Ratio:
    """A mean with a bootstrap interval over its values (N,)."""
    return weighted_mean(values, np.ones(len(values)), np.arange(len(values)))
