"""What in-context learning found: accuracies with intervals, tables and a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_memlong.evaluation.base import Report
from lightning_memlong.evaluation.figures import draw_accuracies
from lightning_memlong.evaluation.record import Row
from lightning_memlong.evaluation.statistics import mean_interval

BASELINE = (4, 0, "off")
"""What the paper's gain is relative to: 4 demonstrations in context, memory off."""


def report(evaluation: Any, rows: Sequence[Row]) -> Report:
    """Tables and figures of the cells of an :class:`InContextLearning`."""
    cells = list(dict.fromkeys((r["context"], r["memory"], r["selection"]) for r in rows))
    tasks = [t for t in evaluation.tasks if any(r["task"] == t for r in rows)]
    data = [_summary(t, c, _of(rows, t, c)) for t in tasks for c in cells if _of(rows, t, c)]
    tables = {
        "Accuracy [%]": _table(data, tasks, cells, "accuracy"),
        "Accuracy, calibrated [%]": _table(data, tasks, cells, "calibrated"),
    }
    notes = [
        "In brackets: 95 % bootstrap interval over examples; which demonstrations were drawn is not in it.",
        "demonstrations: in context + in memory.",
        "majority class: always the most frequent label of the examples asked.",
        "calibrated: batch calibration (arXiv 2309.17249), the mean log-probability of each label over the examples "
        "taken off.",
        "gain: the mean of the tasks, relative to 4 demonstrations in context without memory.",
    ]
    figure = draw_accuracies(data, tasks, [name(c) for c in cells], evaluation.title)
    return Report(f"In-context learning: {evaluation.title}", notes, tables, data, {"accuracy": figure})


def name(cell: tuple[int, int, str]) -> str:
    """``4 + 200 (similarity)``."""
    context, memory, selection = cell
    return f"{context} + {memory} ({selection})" if memory else f"{context}"


def _of(rows: Sequence[Row], task: str, cell: tuple[int, int, str]) -> list[Row]:
    return [r for r in rows if r["task"] == task and (r["context"], r["memory"], r["selection"]) == cell]


def _summary(task: str, cell: tuple[int, int, str], rows: Sequence[Row]) -> Row:
    found: Row = {"task": task, "demonstrations": name(cell), **dict(zip(("context", "memory", "selection"), cell,
                                                                         strict=True))}  # fmt: skip
    found["examples"] = sum(len(r["hits"]) for r in rows)
    for column, source in (("accuracy", "hits"), ("calibrated", "calibrated")):
        interval = mean_interval(np.array([int(hit) for r in rows for hit in r[source]]))
        found |= {column: interval.value, f"{column}_low": interval.low, f"{column}_high": interval.high}
    return found | {"majority": sum(r["majority"] for r in rows) / found["examples"]}


def _table(data: Sequence[Row], tasks: Sequence[str], cells: Sequence[tuple[int, int, str]], column: str) -> list[Row]:
    by = {(r["task"], r["demonstrations"]): r for r in data}
    means = {c: _mean(by, tasks, c, column) for c in cells}
    base = means.get(BASELINE)
    rows: list[Row] = []
    for cell in cells:
        row: Row = {"demonstrations": name(cell)}
        for task in tasks:
            found = by.get((task, name(cell)))
            row[task] = "" if found is None else _shown(found, column)
        mean = means[cell]
        row["mean"] = "" if mean is None else f"{100 * mean:.1f}"
        row["gain"] = "" if mean is None or not base else f"{mean / base - 1:+.1%}"
        rows.append(row)
    majority = {t: next(r["majority"] for r in data if r["task"] == t) for t in tasks}
    shown = {t: f"{100 * value:.1f}" for t, value in majority.items()}
    mean = float(np.mean(list(majority.values())))
    rows.append({"demonstrations": "majority class", **shown, "mean": f"{100 * mean:.1f}", "gain": ""})
    return rows


def _mean(by: Any, tasks: Sequence[str], cell: tuple[int, int, str], column: str) -> float | None:
    found = [by.get((task, name(cell))) for task in tasks]
    return None if None in found else float(np.mean([r[column] for r in found]))


def _shown(row: Row, column: str) -> str:
    return f"{100 * row[column]:.1f} ({100 * row[f'{column}_low']:.1f}..{100 * row[f'{column}_high']:.1f})"
