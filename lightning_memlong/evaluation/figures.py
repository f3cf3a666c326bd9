"""Pictures of evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = {"above": "tab:blue", "every": "tab:purple", "spread": "tab:orange", "own": "tab:green"}
HELPS = 1.06
"""Ratios up to here are shown by themselves: what hurts can hurt a hundredfold, and would flatten the rest."""


def draw_layers(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Perplexity with memory by perplexity without, against the memory layer; one line a choice of layers and source.

    Left what is near or below 1, and, where anything hurts more, all of it on the right.

    Args:
        rows: As :func:`lightning_memlong.evaluation.layers.table` gives them.
        title: What was scored on what.
    """
    ratios = [float(r["ratio"]) for r in rows]
    hurts = max(ratios) > HELPS
    figure = Figure(figsize=(11.5 if hurts else 7.5, 3.8), layout="constrained")
    near = figure.add_subplot(1, 2 if hurts else 1, 1)
    _draw(near, rows)
    near.set_ylim(min(ratios) - 0.02, HELPS)
    figure.legend(*near.get_legend_handles_labels(), fontsize=8, loc="outside right center", handlelength=3.5)
    near.set_ylabel("perplexity, memory on / off")
    near.set_title("where it helps", fontsize=10)
    if hurts:
        everything = figure.add_subplot(1, 2, 2)
        _draw(everything, rows)
        everything.set_yscale("log")
        everything.set_title("all combinations (log scale)", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.axhline(1.0, color="0.4", linewidth=1)
    axes.annotate("memory off", (0.01, 1.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.4")
    for source, style in (("single", "--"), ("per_layer", "-")):
        for readers, colour in COLOURS.items():
            points = sorted((int(r["memory_layer"]), float(r["ratio"])) for r in rows
                            if (r["source"], r["readers"]) == (source, readers))  # fmt: skip
            if points:
                label = f"{source}, read in {readers}"
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=label)
    axes.set_xlabel("memory layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
