"""Timing of two or more ways side by side: one process, turn about, medians."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def now() -> float:
    """Seconds, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def paired(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time functions turn about, each round in another order.

    Args:
        ways: Name -> function; the last one is what the others are compared with.
        rounds: How often each is timed, after one call that is not.

    Returns:
        Median seconds, and the median over rounds of each one's time by the last one's.
    """
    names, times = list(ways), {name: [] for name in ways}
    for function in ways.values():
        function()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = now()
            ways[name]()
            times[name].append(now() - start)
        print(f"\r  round {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    last = times[names[-1]]
    ratios = {n: statistics.median(a / b for a, b in zip(times[n], last, strict=True)) for n in names}
    return {n: statistics.median(t) for n, t in times.items()}, ratios
