"""What banks that forget are worth: tables, and a picture with one line a policy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_memlong.evaluation.base import Report, TableRow
from lightning_memlong.evaluation.figures import looks, short_tokens
from lightning_memlong.evaluation.grid import OFF
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.statistics import Ratio, bootstrap_groups, paired_ratio

EVERYTHING = "everything kept"
ASKED, SILENT = "asked", "silent"
"""What is measured of facts: asked for on the way, or never before the end; columns of the file begin so."""


def report_eviction(
    title: str, policies: Sequence[str], capacities: Sequence[int], measurements: Sequence[Measurement], seed: int
) -> Report:
    """Tables and a figure of what was measured.

    Args:
        title: What was evaluated.
        policies: Their names, in order.
        capacities: Sizes of the bank [tokens].
        measurements: Of windows, facts and what was evicted.
        seed: Of bootstrap intervals.
    """
    measured = {(r["policy"], r["capacity"]) for r in measurements}
    policies = [name for name in policies if (name, capacities[0]) in measured]
    with_model = any("nll" in r for r in measurements)
    cells = [(OFF, 0), (EVERYTHING, 0), *((name, size) for name in policies for size in capacities)]
    data, tables = [], {}
    for corpus in dict.fromkeys(r["corpus"] for r in measurements):
        of_corpus = [r for r in measurements if r["corpus"] == corpus]
        found = [_summary(of_corpus, *cell, seed) for cell in cells if cell in measured]
        data += found
        if with_model:
            tables[f"{corpus}: perplexity"] = _perplexities(found, policies, capacities)
        if any(r["what"] == SILENT for r in of_corpus):
            tables[f"{corpus}: facts planted early, asked for at the end"] = [
                _facts_row(row, with_model) for row in found
            ]
        tables[f"{corpus}: what was evicted"] = [_churn_row(row) for row in found if row["capacity"]]
    figure = _draw(data, policies, title)
    drawn = " or ".join(sorted({row["drawn"] for row in data if row["drawn"]}))
    notes = [*(_notes_on_perplexity(drawn) if with_model else []), *_notes_on_what_is_kept()]
    return Report(f"Eviction: {title}", notes, tables, data, {"capacity": figure})


def _notes_on_perplexity(drawn: str) -> list[str]:
    return [
        f"In brackets: by the perplexity of a bank that keeps everything, on the same tokens, and its 95 % bootstrap "
        f"interval over {drawn}; above 1: what was evicted is missed, below 1: it had misled. {OFF} and {EVERYTHING} "
        "have no capacity.",
        "A policy pays if it is below fifo, which looks at nothing: their intervals say whether it is.",
        "Keys and values are the same in all cells: documents were read without memory.",
    ]


def _notes_on_what_is_kept() -> list[str]:
    return [
        "asked: on the way, too, which counts as use, so that a policy by use has a reason to keep the fact; never "
        "asked: the same facts in a reading without such questions. kept: a chunk with a part of it is in the bank at "
        "the end; retrieved: it is among the chunks found; tokens right: of the answers', given the true ones before.",
        "never used: of the entries that were evicted, those that nothing had retrieved (or, for use by attention, "
        "looked at). reach: from the oldest entry to the end of the text. still there: of the chunks that a bank that "
        "keeps everything finds for the scored windows, those that the bank has.",
    ]


def _summary(rows: Sequence[Measurement], policy: str, capacity: int, seed: int) -> TableRow:
    """One cell as numbers; None where it has none of the kind."""
    mine = [r for r in rows if (r["policy"], r["capacity"]) == (policy, capacity)]
    windows = [r for r in mine if r["what"] == "window"]
    found: TableRow = {
        "corpus": mine[0]["corpus"], "policy": policy, "capacity": capacity,
        "documents": len({r["document"] for r in mine}), "windows": len(windows),
        **_perplexity(rows, [r for r in windows if "nll" in r], seed),
    }  # fmt: skip
    wanted = sum(r.get("wanted", 0) for r in windows)
    found["still_there"] = sum(r["there"] for r in windows) / wanted if wanted else None
    churn = [r for r in mine if r["what"] == "churn"]
    evicted = sum(r["evictions"] for r in churn)
    found |= {"evictions": evicted if churn else None, "entries": _mean([r["entries"] for r in churn])}
    found["never_used"] = 1 - sum(r["used"] for r in churn) / evicted if evicted else None
    found["reach"] = _mean([r["reach"] for r in churn])
    for what in (ASKED, SILENT):  # with nothing to be evicted it does not matter who asks
        found |= _facts([r for r in mine if r["what"] == (what if capacity else SILENT)], what)
    return found


def _perplexity(rows: Sequence[Measurement], windows: Sequence[Measurement], seed: int) -> TableRow:
    """Of a cell's windows; None where nothing was scored."""
    ratios = [f"by_{name}{end}" for name in ("everything", "off") for end in ("", "_low", "_high")]
    if not windows:
        return dict.fromkeys(("tokens", "perplexity", "drawn", *ratios))
    places = [(r["document"], r["place"]) for r in windows]
    groups, drawn = bootstrap_groups([d for d, _ in places], [p for _, p in places])
    nll, tokens = (np.array([r[k] for r in windows], dtype=float) for k in ("nll", "tokens"))
    values: list[float] = []
    for control in (EVERYTHING, OFF):
        same = {(r["document"], r["place"]): r["nll"] for r in rows if (r["policy"], r["what"]) == (control, "window")}
        values += paired_ratio(nll, np.array([same[p] for p in places]), tokens, groups, seed)
    mean = float(np.exp(nll.sum() / tokens.sum()))
    return {"tokens": int(tokens.sum()), "perplexity": mean, "drawn": drawn, **dict(zip(ratios, values, strict=True))}


def _facts(rows: Sequence[Measurement], begins: str) -> TableRow:
    tokens = sum(r.get("tokens", 0) for r in rows)
    return {
        f"{begins}_facts": len(rows), f"{begins}_kept": _mean([r["kept"] for r in rows if "kept" in r]),
        f"{begins}_retrieved": _mean([r["hit"] for r in rows if "hit" in r]),
        f"{begins}_right": _mean([r["correct"] for r in rows if "correct" in r]),
        f"{begins}_tokens_right": sum(r["right_tokens"] for r in rows) / tokens if tokens else None,
        f"{begins}_nll_per_token": sum(r["nll"] for r in rows) / tokens if tokens else None,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _perplexities(found: Sequence[TableRow], policies: Sequence[str], capacities: Sequence[int]) -> list[TableRow]:
    """Policies by capacities."""
    texts = {}
    for row in found:
        ratio = Ratio(row["by_everything"], row["by_everything_low"], row["by_everything_high"])
        bracket = "" if row["policy"] == EVERYTHING else f" ({ratio})"
        texts[row["policy"], row["capacity"]] = f"{row['perplexity']:.3f}{bracket}"
    rows = [(OFF, [0] * len(capacities)), (EVERYTHING, [0] * len(capacities)), *((p, capacities) for p in policies)]
    return [
        {"memory": name, **{short_tokens(c): texts[name, at] for c, at in zip(capacities, sizes, strict=True)}}
        for name, sizes in rows
    ]


def _facts_row(row: TableRow, answered: bool) -> TableRow:
    shown: TableRow = {"memory": row["policy"], "bank": short_tokens(row["capacity"]) if row["capacity"] else ""}
    for begins, name in ((ASKED, "asked"), (SILENT, "never asked")):
        for what in ("kept", "retrieved", *(("tokens_right",) if answered else ())):
            shown[f"{name}: {what.replace('_', ' ')} [%]"] = _percent(row[f"{begins}_{what}"])
    return {**shown, "facts": row["silent_facts"]}


def _churn_row(row: TableRow) -> TableRow:
    return {
        "memory": row["policy"], "bank": short_tokens(row["capacity"]), "evicted [chunks]": row["evictions"],
        "never used [%]": _percent(row["never_used"]), "entries at the end": f"{row['entries']:.0f}",
        "reach [tokens]": f"{row['reach']:,.0f}", "still there [%]": _percent(row["still_there"]),
    }  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


# ---- the picture ----------------------------------------------------------------------------------------------


def _draw(data: Sequence[TableRow], policies: Sequence[str], title: str) -> Figure:
    """A row a corpus: perplexity by that of everything kept, and facts that are still there, against the capacity."""
    corpora = list(dict.fromkeys(row["corpus"] for row in data))
    with_facts = any(row["asked_facts"] for row in data)
    columns = 3 if with_facts else 1
    figure = Figure(figsize=(4.2 * columns + 2.4, 3.4 * len(corpora) + 0.4), layout="constrained")
    grid = figure.subplots(len(corpora), columns, squeeze=False)
    styles = looks(policies)
    for panels, corpus in zip(grid, corpora, strict=True):
        mine = [row for row in data if row["corpus"] == corpus]
        if any(row["by_everything"] is not None for row in mine):
            _draw_perplexity(panels[0], mine, styles)
            panels[0].set_ylabel(f"{corpus}\nperplexity / everything kept")
        else:
            _draw_shares(panels[0], mine, styles, "still_there")
            panels[0].set_ylabel(f"{corpus}\nof what all would give, still there [%]")
        for axes, begins, name in zip(panels[1:], (ASKED, SILENT), ("asked on the way", "never asked"), strict=False):
            _draw_shares(axes, mine, styles, f"{begins}_kept")
            axes.set_title(f"planted early, {name}", fontsize=10)
            axes.set_ylabel("facts still there at the end [%]")
        for axes in panels:
            sizes = sorted({row["capacity"] for row in mine if row["capacity"]})
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [short_tokens(size) for size in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("capacity of the bank [tokens]")
            axes.grid(alpha=0.3)
    figure.suptitle(f"Eviction: {title}", fontsize=11)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def _points(rows: Sequence[TableRow], policy: str) -> list[TableRow]:
    return sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["capacity"])


def _draw_perplexity(axes: Axes, rows: Sequence[TableRow], styles: dict[str, dict[str, Any]]) -> None:
    axes.axhline(1.0, color="0.4", linewidth=1)
    off = next(row["by_everything"] for row in rows if row["policy"] == OFF)
    axes.axhline(off, color="0.4", linewidth=1, linestyle=":")
    axes.annotate("memory off", (0.99, off), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    for policy, look in styles.items():
        points = _points(rows, policy)
        x, y, low, high = ([p[k] for p in points] for k in
                           ("capacity", "by_everything", "by_everything_low", "by_everything_high"))  # fmt: skip
        axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)
        axes.plot(x, y, **look, markersize=4, label=policy)


def _draw_shares(axes: Axes, rows: Sequence[TableRow], styles: dict[str, dict[str, Any]], column: str) -> None:
    for number, (policy, look) in enumerate(styles.items()):
        points = [p for p in _points(rows, policy) if p[column] is not None]
        aside = 2 ** (0.05 * (number - len(styles) / 2))  # or lines at 0 and at 100 % would hide each other
        x, y = [aside * p["capacity"] for p in points], [100 * p[column] for p in points]
        axes.plot(x, y, **look, markersize=4, label=policy)
    axes.set_ylim(-4, 104)
