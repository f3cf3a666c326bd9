"""What in-context learning found: accuracies with intervals, tables and a picture."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lightning_memlong.evaluation.base import Report, TableRow
from lightning_memlong.evaluation.demonstrations import Shots
from lightning_memlong.evaluation.figures import draw_accuracies
from lightning_memlong.evaluation.record import Measurement
from lightning_memlong.evaluation.statistics import weighted_mean

BASELINE = Shots(4, 0, "off")
"""What the paper's gain is relative to: 4 demonstrations in context, memory off."""


def report_icl(title: str, tasks: Iterable[str], measurements: Sequence[Measurement]) -> Report:
    """Tables and figures of all ways of giving demonstrations that were measured."""
    ways = list(dict.fromkeys(Shots(r["context"], r["memory"], r["selection"]) for r in measurements))
    tasks = [t for t in tasks if any(r["task"] == t for r in measurements)]
    data = [_summary(t, s, _of(measurements, t, s)) for t in tasks for s in ways if _of(measurements, t, s)]
    tables = {
        "Accuracy [%]": _table(data, tasks, ways, "accuracy"),
        "Accuracy, calibrated [%]": _table(data, tasks, ways, "calibrated"),
    }
    notes = [
        "In brackets: 95 % bootstrap interval over examples; which demonstrations were drawn is not in it.",
        "demonstrations: in context + in memory.",
        "majority class: always the most frequent label of the examples asked.",
        "calibrated: batch calibration (arXiv 2309.17249), the mean log-probability of each label over the examples "
        "taken off.",
        "gain: the mean of the tasks, relative to 4 demonstrations in context without memory.",
    ]
    figure = draw_accuracies(data, tasks, [shots.label for shots in ways], title)
    return Report(f"In-context learning: {title}", notes, tables, data, {"accuracy": figure})


def _of(measurements: Sequence[Measurement], task: str, shots: Shots) -> list[Measurement]:
    return [r for r in measurements if r["task"] == task and (r["context"], r["memory"], r["selection"]) == shots]


def _summary(task: str, shots: Shots, measurements: Sequence[Measurement]) -> TableRow:
    found: TableRow = {"task": task, "demonstrations": shots.label, **shots._asdict()}
    found["examples"] = sum(len(r["hits"]) for r in measurements)
    # Seeds may ask the same example: its answers are drawn together.
    same = np.unique([number for r in measurements for number in r["asked"]], return_inverse=True)[1]
    for column, source in (("accuracy", "hits"), ("calibrated", "calibrated")):
        hits = np.array([int(hit) for r in measurements for hit in r[source]])
        interval = weighted_mean(hits, np.ones(len(hits)), same)
        found |= {column: interval.value, f"{column}_low": interval.low, f"{column}_high": interval.high}
    return found | {"majority": sum(r["majority"] for r in measurements) / found["examples"]}


def _table(data: Sequence[TableRow], tasks: Sequence[str], ways: Sequence[Shots], column: str) -> list[TableRow]:
    by = {(r["task"], r["demonstrations"]): r for r in data}
    means = {shots: _mean(by, tasks, shots, column) for shots in ways}
    base = means.get(BASELINE)
    rows: list[TableRow] = []
    for shots in ways:
        row: TableRow = {"demonstrations": shots.label}
        for task in tasks:
            found = by.get((task, shots.label))
            row[task] = "" if found is None else _shown(found, column)
        mean = means[shots]
        row["mean"] = "" if mean is None else f"{100 * mean:.1f}"
        row["gain"] = "" if mean is None or not base else f"{mean / base - 1:+.1%}"
        rows.append(row)
    majority = {t: next(r["majority"] for r in data if r["task"] == t) for t in tasks}
    shown = {t: f"{100 * value:.1f}" for t, value in majority.items()}
    mean = float(np.mean(list(majority.values())))
    rows.append({"demonstrations": "majority class", **shown, "mean": f"{100 * mean:.1f}", "gain": ""})
    return rows


def _mean(by: Mapping[tuple[str, str], TableRow], tasks: Sequence[str], shots: Shots, column: str) -> float | None:
    found = [row for task in tasks if (row := by.get((task, shots.label))) is not None]
    return float(np.mean([row[column] for row in found])) if len(found) == len(tasks) else None


def _shown(row: TableRow, column: str) -> str:
    return f"{100 * row[column]:.1f} ({100 * row[f'{column}_low']:.1f}..{100 * row[f'{column}_high']:.1f})"
