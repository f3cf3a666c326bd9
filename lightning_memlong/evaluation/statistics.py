"""Intervals: how far a result would move if other documents had been drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

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


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Token-weighted: exp of the summed losses by the summed tokens."""
    return float(np.exp(nll.sum() / tokens.sum()))


def draws(documents: Sequence[str], windows: Sequence[int]) -> tuple[np.ndarray, str]:
    """Which measurements are drawn together, as a number each, and what that is called."""
    names = list(dict.fromkeys(documents))
    if len(names) >= FEWEST_DOCUMENTS:
        return np.array([names.index(d) for d in documents]), "documents"
    places = list(dict.fromkeys(zip(documents, windows, strict=True)))
    return np.array([places.index(p) for p in zip(documents, windows, strict=True)]), "windows"


def _sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.bincount(groups, weights=values)


def paired_ratio(nll: np.ndarray, other: np.ndarray, tokens: np.ndarray, groups: np.ndarray, seed: int = 0) -> Ratio:
    """Perplexity by another perplexity on the same tokens, with a paired bootstrap interval over groups.

    Args:
        nll: (N,) summed losses of each measurement.
        other: (N,) those it is held against.
        tokens: (N,) tokens of each.
        groups: (N,) what is drawn together.
        seed: Of the draws.
    """
    difference, weight = _sums(nll - other, groups), _sums(tokens.astype(float), groups)
    value = float(np.exp(difference.sum() / weight.sum()))
    if len(difference) < 2:
        return Ratio(value, float("nan"), float("nan"))
    found = bootstrap(
        (difference, weight),
        lambda d, w, axis=-1: np.exp(d.sum(axis) / w.sum(axis)),
        paired=True, vectorized=True, method="percentile", n_resamples=2000, confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    interval = found.confidence_interval
    return Ratio(value, float(interval.low), float(interval.high))


def mean_interval(values: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> Ratio:
    """A mean with a bootstrap interval over groups, over single values if there are none."""
    groups = np.arange(len(values)) if groups is None else groups
    totals, counts = _sums(values.astype(float), groups), np.bincount(groups).astype(float)
    value = float(totals.sum() / counts.sum())
    if len(totals) < 2:
        return Ratio(value, float("nan"), float("nan"))
    if np.ptp(totals / counts) == 0:
        return Ratio(value, value, value)
    found = bootstrap(
        (totals, counts),
        lambda t, c, axis=-1: t.sum(axis) / c.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=2000, confidence_level=LEVEL,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    interval = found.confidence_interval
    return Ratio(value, float(interval.low), float(interval.high))
