"""Pictures of evaluations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator

COLOURS = {"above": "tab:blue", "every": "tab:purple", "spread": "tab:orange", "own": "tab:green"}
HELPS = 1.06
"""Ratios up to here are shown by themselves: what hurts can hurt a hundredfold, and would flatten the rest."""


def draw_layers(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Perplexity with memory by perplexity without, against the memory layer; one line a choice of layers and source.

    Left what is near or below 1, and, where anything hurts more, all of it on the right.

    Args:
        rows: As :func:`lightning_memlong.evaluation.layer_grid.layer_table` gives them.
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


PALETTE = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
)
SHAPES = (("-", "o", ""), ("--", "s", "//"), (":", "^", ".."), ("-.", "D", "xx"))
"""Line, marker and filling of bars; the next where colours begin anew."""


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each of several is drawn in all pictures that show it, no two alike (up to 36): for ``plot``."""
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        line, marker, _ = SHAPES[number // len(PALETTE) % len(SHAPES)]
        found[name] = {"color": PALETTE[number % len(PALETTE)], "linestyle": line, "marker": marker}
    return found


def _filling(look: Mapping[str, Any]) -> str:
    return next(hatch for line, _, hatch in SHAPES if line == look["linestyle"])


def short_tokens(tokens: float) -> str:
    """A number of tokens on an axis."""
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else f"{tokens:.0f}"


def draw_grid(
    data: Sequence[Mapping[str, Any]], title: str, window: int, drawn: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Perplexity by perplexity with memory off against the length of context; one panel a corpus, bands: intervals.

    Args:
        data: As :func:`lightning_memlong.evaluation.perplexity_report.report_perplexity` has them.
        title: What was scored.
        window: Local tokens; lengths up to here have no memory.
        drawn: How each setting is drawn, but for the one that all are held against.
    """
    figure, panels = _ratio_panels(data, title, "context [tokens]")
    for corpus, axes in panels.items():
        for name, look in drawn.items():
            points = [r for r in data if (r["corpus"], r["setting"]) == (corpus, name) and r["length"] >= window]
            if points:
                x, y, low, high = ([r[k] for r in points] for k in ("length", "ratio", "low", "high"))
                axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
                axes.plot(x, y, **look, markersize=4, label=name)
        axes.set_xscale("log", base=2)
        lengths = sorted({r["length"] for r in data if r["length"] >= window})
        axes.set_xticks(lengths, [short_tokens(n) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    _legend(figure, [*panels.values()])
    return figure


def draw_where(
    where: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str, drawn: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Where memory helps, one row of panels a corpus: by place, by distance, attention by layer, tokens that gain.

    Args:
        where: Corpus -> setting -> what was found.
        title: What was scored.
        drawn: How each setting is drawn.
    """
    most = max(map(len, where.values()))
    figure = Figure(figsize=(14, max(3.2, 0.2 * most + 1) * len(where) + 0.6), layout="constrained")
    grid = figure.subplots(len(where), 4, squeeze=False)
    for row, (corpus, settings) in enumerate(where.items()):
        for number, (name, facts) in enumerate(settings.items()):
            look = drawn[name]
            for axes, what in zip(grid[row, :2], ("position", "distance"), strict=True):
                x = [place for place, _ in facts[what]]
                y = [ratio.value for _, ratio in facts[what]]
                bars = [[r.value - r.low for _, r in facts[what]], [r.high - r.value for _, r in facts[what]]]
                axes.errorbar(x, y, yerr=bars, **look, markersize=4, capsize=2, label=name)
            if facts["mass"]:
                grid[row, 2].plot(*zip(*facts["mass"], strict=True), **look, markersize=3)
            grid[row, 3].barh(number, 100 * facts["improved"], color=look["color"], hatch=_filling(look), alpha=0.85)
        for axes, label in zip(grid[row], ("place in the document [tokens]", "distance to the nearest match [tokens]",
                                           "layer", "tokens whose loss falls [%]"), strict=True):  # fmt: skip
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        for axes in grid[row, :2]:
            axes.axhline(1.0, color="0.4", linewidth=1)
            axes.xaxis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(max(axes.get_xlim()[1], 1) / 6))))
            axes.xaxis.set_major_formatter(lambda v, _: short_tokens(v))
        grid[row, 0].set_ylabel(f"{corpus}\nperplexity / memory off")
        grid[row, 2].set_ylabel("attention on memory")
        grid[row, 3].set_yticks(range(len(settings)), list(settings), fontsize=8)
        grid[row, 3].invert_yaxis()  # in the order of the tables
        grid[row, 3].axvline(50, color="0.4", linewidth=1)
    figure.suptitle(f"Where memory helps: {title}", fontsize=11)
    return figure


def draw_cost(rows: Sequence[Mapping[str, Any]], title: str, drawn: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Perplexity by memory off against keys and values held, one panel a corpus, one point a way of using the text.

    Args:
        rows: Of one length, as :func:`lightning_memlong.evaluation.perplexity_report.report_perplexity` has them.
        title: What was scored.
        drawn: How each setting is drawn, but for the one that all are held against.
    """
    figure, panels = _ratio_panels(rows, title, "keys and values held [MB]")
    for corpus, axes in panels.items():
        for row in (r for r in rows if r["corpus"] == corpus and r["megabytes"] is not None):
            look = drawn.get(row["setting"], {"color": "0.4", "marker": "o"})
            bars = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
            axes.errorbar(row["megabytes"], row["ratio"], yerr=bars, color=look["color"], marker=look["marker"],
                          linestyle="none", capsize=2, label=row["setting"])  # fmt: skip
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    _legend(figure, [*panels.values()])
    return figure


def _ratio_panels(rows: Sequence[Mapping[str, Any]], title: str, below: str) -> tuple[Figure, dict[str, Axes]]:
    """A panel a corpus for perplexity by memory off, against what is said below it."""
    corpora = list(dict.fromkeys(r["corpus"] for r in rows))
    figure, panels = _panels(len(corpora), title)
    for axes, corpus in zip(panels, corpora, strict=True):
        axes.axhline(1.0, color="0.4", linewidth=1)
        axes.set_title(corpus, fontsize=10)
        axes.set_xlabel(below)
    panels[0].set_ylabel("perplexity / memory off")
    return figure, dict(zip(corpora, panels, strict=True))


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.4 * count + 2.4, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), fontsize=8, loc="outside right center")


def draw_accuracies(
    data: Sequence[Mapping[str, Any]], tasks: Sequence[str], shots: Sequence[str], title: str
) -> Figure:
    """Calibrated accuracy with intervals, one group of bars a task, one bar a way of giving demonstrations."""
    figure = Figure(figsize=(2.6 * len(tasks) + 3, 3.8), layout="constrained")
    axes = figure.add_subplot()
    width, drawn = 0.8 / max(1, len(shots)), looks(shots)
    for number, label in enumerate(shots):
        rows = [next((r for r in data if (r["task"], r["demonstrations"]) == (t, label)), None) for t in tasks]
        found = [(place, r) for place, r in enumerate(rows) if r is not None]
        x = [place + (number - (len(shots) - 1) / 2) * width for place, _ in found]
        y = [100 * r["calibrated"] for _, r in found]
        bars = [[100 * (r["calibrated"] - r["calibrated_low"]) for _, r in found],
                [100 * (r["calibrated_high"] - r["calibrated"]) for _, r in found]]  # fmt: skip
        look = drawn[label]
        axes.bar(x, y, width, yerr=bars, capsize=2, color=look["color"], hatch=_filling(look), label=label)
    for place, task in enumerate(tasks):
        majority = 100 * next(r["majority"] for r in data if r["task"] == task)
        axes.plot([place - 0.45, place + 0.45], [majority] * 2, color="black", linestyle=":", linewidth=1.2)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("accuracy, calibrated [%]")
    axes.set_title(f"{title} (dotted: majority class)", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center",
                  title="demonstrations:\nin context + in memory")  # fmt: skip
    return figure


def draw_recall(data: Sequence[Mapping[str, Any]], kinds: Sequence[str], settings: Sequence[str], title: str) -> Figure:
    """Heat maps of answers that are right over depth and length: a row a kind, a column a way of choosing memory."""
    lengths, depths = (sorted({r[k] for r in data}) for k in ("length", "depth"))
    figure = Figure(figsize=(2.9 * len(settings) + 1.6, 2.3 * len(kinds) + 0.8), layout="constrained")
    grid = figure.subplots(len(kinds), len(settings), squeeze=False)
    image = None
    for row, kind in enumerate(kinds):
        for column, setting in enumerate(settings):
            axes = grid[row, column]
            found = {(r["depth"], r["length"]): r for r in data if (r["kind"], r["setting"]) == (kind, setting)}
            what = [[found[d, n]["tokens_right"] if (d, n) in found else float("nan") for n in lengths] for d in depths]
            image = axes.imshow(what, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    if (cell := found.get((depth, length))) is not None:
                        mark = "" if cell["retrieved"] is None else f"\n{100 * cell['retrieved']:.0f} %"
                        ink = "black" if 0.15 < cell["tokens_right"] < 0.85 else "white"
                        label = f"{100 * cell['tokens_right']:.0f}{mark}"
                        axes.text(x, y, label, ha="center", va="center", fontsize=7, color=ink)
            axes.set_xticks(range(len(lengths)), [short_tokens(n) for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
            axes.set_title(f"{kind}: {setting}", fontsize=9)
            if column == 0:
                axes.set_ylabel("depth")
            if row == len(kinds) - 1:
                axes.set_xlabel("length [tokens]")
    figure.suptitle(f"{title}: tokens of answers that are right [%], below: retrieved", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.7)
    return figure
