"""What a perplexity grid found: sums over windows, tables and pictures."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_memlong.evaluation.base import Report, TableRow
from lightning_memlong.evaluation.cost import cost_columns, megabytes, seconds
from lightning_memlong.evaluation.figures import draw_cost, draw_grid, draw_where, looks, short_tokens
from lightning_memlong.evaluation.grid import LONGER, OFF, Grid
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.statistics import Ratio, bootstrap_groups, mean_interval, paired_ratio
from lightning_memlong.evaluation.token_kinds import LIFTED, kinds_table
from lightning_memlong.retrieval import CONTROL_SELECTIONS


def report_perplexity(grid: Grid, measurements: Sequence[Measurement]) -> Report:
    """Tables and figures of what was measured in the cells of a grid."""
    corpora = list(dict.fromkeys(row["corpus"] for row in measurements))
    data, tables, drawn = [], {}, set()
    for corpus in corpora:
        of_corpus = [r for r in measurements if r["corpus"] == corpus]
        found = _aggregate(grid, of_corpus)
        data += found
        drawn |= {r["drawn"] for r in found}
        tables[f"{corpus}: perplexity"] = _pivot(grid, found, _perplexity_text)
        tables[f"{corpus}: at {max(grid.lengths)} tokens"] = _details(grid, found)
        tables[f"{corpus}: at {max(grid.lengths)} tokens, against the controls"] = _against(grid, of_corpus)
        if grid.alternatives:
            tables[f"{corpus}: at {max(grid.lengths)} tokens, which of them gain"] = kinds_table(of_corpus, grid.seed)
            tables[f"{corpus}: at {max(grid.lengths)} tokens, what it costs"] = _costs(grid, found)
    where = {corpus: _where(grid, [r for r in measurements if r["corpus"] == corpus]) for corpus in corpora}
    styles = looks(dict.fromkeys(r["setting"] for r in measurements if r["setting"] != OFF))
    figures = {"perplexity": draw_grid(data, grid.title, grid.local, styles)}
    if any(any(facts.values()) for facts in where.values()):
        figures["where"] = draw_where(where, grid.title, styles)
    if grid.alternatives:
        longest = [r for r in data if r["length"] == max(grid.lengths)]
        figures["cost"] = draw_cost(longest, f"{grid.title}, {short_tokens(max(grid.lengths))}", styles)
    notes = [
        f"In brackets: by perplexity with memory off on the same tokens, and its 95 % bootstrap interval over "
        f"{' or '.join(sorted(drawn))}.",
        "off and recent do not depend on the length once the window, and the chunks, are full."
        if grid.protocol == "sliding"
        else "Lengths have pieces, and scored tokens, of their own: compare within a column.",
        "against the controls: perplexity by that of the control on the same tokens, paired; below 1: choosing pays.",
        f"{LONGER}: no memory, a plain window of as many tokens as window and retrieved chunks together, at most the "
        f"{grid.longest:,} that the backbone was made for.",
    ]
    if grid.alternatives:
        notes += [
            "what it costs: keys and values of the window, all layers, and of what lies before it where it is held (in "
            "a bank: of the layers that store); time from the text to the losses of its last tokens, median, here.",
            f"which of them gain: lifted: the longest plain window measured lowers the loss by more than {LIFTED:g} "
            f"nats, to less than {LIFTED:g}; copied: they follow the same token before the window too, and not yet in "
            "it.",
        ]
    if any("LEAKS" in name for name in grid.retrievals):
        notes.append(
            "LEAKS: retrieves with the text that is being predicted, as the reference code does; not a fair number."
        )
    return Report(f"Perplexity: {grid.title}", notes, tables, data, figures)


def _aggregate(grid: Grid, rows: Sequence[Measurement]) -> list[TableRow]:
    """One row for each setting at each length."""
    result = []
    for name in dict.fromkeys(r["setting"] for r in rows):
        for length in grid.lengths:
            cell = [r for r in rows if r["setting"] == name and r["length"] == length]
            if cell:
                result.append(_summary(grid, name, length, cell))
    return result


def _summary(grid: Grid, name: str, length: int, cell: Sequence[Measurement]) -> TableRow:
    nll, off, tokens = (np.array([r[k] for r in cell], dtype=float) for k in ("nll", "nll_off", "tokens"))
    if grid.protocol == "reference":  # the mean of sequence losses, as published: every window counts the same
        nll, off, tokens = nll / tokens, off / tokens, np.ones(len(cell))
    groups, drawn = bootstrap_groups([r["document"] for r in cell], [r["window"] for r in cell])
    ratio = paired_ratio(nll, off, tokens, groups, grid.seed)
    total = float(np.array([r["nll"] for r in cell]).sum())
    mean = nll.sum() / tokens.sum()
    return {
        "corpus": cell[0]["corpus"], "setting": name, "length": length, "documents": len({r["document"] for r in cell}),
        "windows": len(cell), "tokens": int(sum(r["tokens"] for r in cell)), "perplexity": float(np.exp(mean)),
        "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "drawn": drawn,
        "bits_per_byte": total / math.log(2) / sum(r["bytes"] for r in cell),
        "word_perplexity": math.exp(min(700.0, total / max(1, sum(r["words"] for r in cell)))),
        "improved": _share(cell), "distance": _mean([r.get("distance") for r in cell]),
        "megabytes": megabytes(cell), "seconds": seconds(cell),
    }  # fmt: skip


def _share(cell: Sequence[Measurement]) -> float:
    return sum(r["improved"] for r in cell) / sum(r["tokens"] for r in cell)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _perplexity_text(row: TableRow) -> str:
    if row["setting"] == OFF:
        return f"{row['perplexity']:.3f}"
    return f"{row['perplexity']:.3f} ({_ratio_text(row)})"


def _ratio_text(row: TableRow) -> str:
    return str(Ratio(row["ratio"], row["low"], row["high"]))


def _pivot(grid: Grid, found: Sequence[TableRow], shown: Callable[[TableRow], str]) -> list[TableRow]:
    """Settings by lengths; empty where a setting has nothing to choose from, or a peer was not made for the length."""
    names = list(dict.fromkeys(r["setting"] for r in found))
    cells = {(r["setting"], r["length"]): shown(r) for r in found}
    lengths = [n for n in grid.lengths if any((name, n) in cells for name in names)]
    return [{"memory": name, **{_short(n): cells.get((name, n), "") for n in lengths}} for name in names]


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _details(grid: Grid, found: Sequence[TableRow]) -> list[TableRow]:
    """The longest length: other units, and how many tokens gain."""
    return [
        {
            "memory": r["setting"], "perplexity": f"{r['perplexity']:.3f}", "on / off": _ratio_text(r),
            "bits per byte": f"{r['bits_per_byte']:.4f}", "word perplexity": f"{r['word_perplexity']:.2f}",
            "tokens better": "" if r["setting"] in (OFF, *grid.peers) else f"{r['improved']:.1%}",
            "mean distance [tokens]": "" if r["distance"] is None else f"{r['distance']:,.0f}",
        }
        for r in found if r["length"] == max(grid.lengths)
    ]  # fmt: skip


def _costs(grid: Grid, found: Sequence[TableRow]) -> list[TableRow]:
    """The longest length: what each way gives, and what it takes."""
    longest = [r for r in found if r["length"] == max(grid.lengths)]
    return [{"memory": r["setting"], "on / off": _ratio_text(r), **cost_columns(r)} for r in longest]


def _against(grid: Grid, rows: Sequence[Measurement]) -> list[TableRow]:
    """Each way of choosing by the controls, on the same tokens: does it matter which chunks are chosen?"""
    longest = [r for r in rows if r["length"] == max(grid.lengths)]
    by: dict[str, dict[tuple[str, int], Measurement]] = {}
    for row in longest:
        by.setdefault(row["setting"], {})[row["document"], row["window"]] = row
    selections = {name: retrieval.config.selection for name, retrieval in grid.retrievals.items() if name in by}
    controls = [name for name, selection in selections.items() if selection in CONTROL_SELECTIONS]
    chosen = [name for name in by if name not in controls and by[name]]
    shown = [name for name in chosen if name not in (OFF, LONGER, *grid.alternatives, *grid.peers)]
    return [{"memory": n, **{f"/ {c}": _by(grid, by[n], by[c]) for c in controls}} for n in shown] if controls else []


def _by(grid: Grid, one: dict[tuple[str, int], Measurement], other: dict[tuple[str, int], Measurement]) -> str:
    places = sorted(one.keys() & other.keys())
    nll, control, tokens = (
        np.array([source[p][k] for p in places], dtype=float)
        for source, k in ((one, "nll"), (other, "nll"), (one, "tokens"))
    )
    groups, _ = bootstrap_groups([document for document, _ in places], [window for _, window in places])
    return str(paired_ratio(nll, control, tokens, groups, grid.seed))


# ---- where it helps -------------------------------------------------------------------------------------------


def _where(grid: Grid, rows: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """At the longest length, of each setting that retrieves: gain by place, by distance, and attention by layer."""
    longest = [r for r in rows if r["length"] == max(grid.lengths) and r.get("chunks")]
    found = {}
    for name in dict.fromkeys(r["setting"] for r in longest):
        mine = [r for r in longest if r["setting"] == name]
        gain = [(r["nll"] - r["nll_off"]) / r["tokens"] for r in mine]
        mass: dict[int, list[float]] = {}
        for row in mine:
            for layer, value in (row.get("mass") or {}).items():
                mass.setdefault(int(layer), []).append(value)
        found[name] = {
            "position": _binned([r["window"] for r in mine], gain),
            "distance": _binned([r["nearest_distance"] for r in mine], gain)
            if all(r["nearest_distance"] is not None for r in mine)
            else [],
            "mass": sorted((layer, float(np.mean(values))) for layer, values in mass.items()),
            "improved": _share(mine),
        }
    return found


def _binned(places: Sequence[float], values: Sequence[float], bins: int = 4) -> list[tuple[float, Ratio]]:
    """Means of values over equally many places each, as ratios of perplexity, with intervals."""
    order = np.argsort(places)
    parts = [p for p in np.array_split(order, min(bins, len(order))) if len(p)]
    result = []
    for part in parts:
        mean = mean_interval(np.array(values)[part])
        result.append((float(np.mean(np.array(places)[part])), Ratio(*np.exp(mean).tolist())))
    return result
