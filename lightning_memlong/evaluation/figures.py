"""Pictures of evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"above": "tab:blue", "every": "tab:purple", "spread": "tab:orange", "own": "tab:green"}


def draw_layers(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Perplexity with memory by perplexity without, against the memory layer; one line a choice of layers and source.

    Args:
        rows: As :func:`lightning_memlong.evaluation.layers.table` gives them.
        title: What was scored on what.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.4", linewidth=1)
    axes.annotate("memory off", (0.005, 1.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="0.4")
    for source in ("per_layer", "single"):
        for readers, colour in COLOURS.items():
            chosen = sorted((r["memory_layer"], r["ratio"]) for r in rows
                            if (r["source"], r["readers"]) == (source, readers))  # fmt: skip
            if chosen:
                _line(axes, chosen, f"{source}, read in {readers}", colour, source)
    ratios = [float(r["ratio"]) for r in rows]
    if max(ratios) > 1.5:  # one bad combination must not flatten the rest
        axes.set_yscale("log")
    axes.set_xlabel("memory layer")
    axes.set_ylabel("perplexity, memory on / off")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _line(axes: Axes, points: list[tuple[int, float]], label: str, colour: str, source: str) -> None:
    style = "-" if source == "per_layer" else "--"
    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=label)
