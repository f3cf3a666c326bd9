"""Pictures of sweeps."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_memlong.evaluation.figures import looks

WIDE = 8
"""Values that span this factor are drawn on a logarithmic axis."""


def draw_axis(axis: str, points: Sequence[tuple[Any, str, list[float]]], relative: bool) -> Figure:
    """What an axis does to perplexity: every run a small point, means joined; one line a setting of other axes.

    Args:
        axis: Its name.
        points: Value, what other axes are set to, and the number of each seed.
        relative: Whether numbers are changes against the baseline [%], or perplexities.
    """
    values = list(dict.fromkeys(str(value) for value, *_ in points))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, *_ in points)
    width = max(5.0, 0.9 * len(values)) if not numeric else 5.5
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.add_subplot()
    if relative:
        axes.axhline(0.0, color="0.4", linewidth=1)
        axes.annotate("baseline", (0.01, 0.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.4")
    for others, look in looks(dict.fromkeys(others for _, others, _ in points)).items():
        line = [(value if numeric else values.index(str(value)), seeds) for value, o, seeds in points
                if o == others and seeds]  # fmt: skip
        if numeric:
            line.sort()
        means = [(x, fmean(seeds)) for x, seeds in line]
        axes.plot(
            *zip(*means, strict=True),
            **(look if numeric else look | {"linestyle": "none"}),
            label=others or None,
        )
        axes.scatter([x for x, seeds in line for _ in seeds], [y for _, seeds in line for y in seeds], s=14,
                     color=look["color"], alpha=0.5)  # fmt: skip
    if numeric:
        found = sorted({value for value, *_ in points})
        if found[0] > 0 and found[-1] / found[0] >= WIDE:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(found, [f"{value:g}" for value in found])
    else:
        long = max(map(len, values)) > 12
        axes.set_xticks(range(len(values)), values, rotation=25 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel(axis)
    axes.set_ylabel("change of perplexity [%]" if relative else "perplexity")
    axes.grid(alpha=0.3)
    if any(others for _, others, _ in points):
        axes.legend(fontsize=8)
    return figure
