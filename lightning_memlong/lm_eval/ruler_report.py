"""What RULER found: scores, and how likely right answers are, by task and length."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_memlong.evaluation import Measurement, Report, TableRow
from lightning_memlong.evaluation.cost import cost_columns, megabytes, seconds
from lightning_memlong.evaluation.figures import looks, short_tokens
from lightning_memlong.evaluation.statistics import wilson

MEASURES = {
    "score": "score [%]",
    "tokens_right": "answer tokens right [%]",
    "beats_wrong": "likelier than a wrong answer [%]",
    "retrieved": "retrieved [%]",
}
"""Columns of the numbers, and what they are called."""
STAND_IN = "Sentences of the haystack were split by a regular expression: nltk's punkt_tab could not be had."


def report_ruler(
    title: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    style: Sequence[str],
    stand_in: bool,
    measurements: Sequence[Measurement],
) -> Report:
    """Tables and figures.

    Args:
        title: What was measured.
        tasks: RULER's names, in their order.
        lengths: Of the documents [tokens].
        style: Those of the tasks whose haystack is another text than RULER's.
        stand_in: Whether sentences were split by our stand-in.
        measurements: One a task, length, sample and setting.
    """
    settings = list(dict.fromkeys(r["setting"] for r in measurements))
    found = {
        (task, length, setting): of for task in tasks for length in lengths for setting in settings
        if (of := [r for r in measurements if (r["task"], r["length"], r["setting"]) == (task, length, setting)])
    }  # fmt: skip
    named = {task: f"{task} (RULER-style)" if task in style else task for task in tasks}
    data = [_summary(named[key[0]], *key[1:], of) for key, of in found.items()]
    shown = [named[task] for task in tasks if any(key[0] == task for key in found)]
    tables = {
        what[0].upper() + what[1:]: _table(data, measure, shown, lengths, settings)
        for measure, what in MEASURES.items()
        if any(row[measure] is not None for row in data)
    }
    if any(row["seconds"] is not None for row in data):
        tables["Cost"] = _costs(data, lengths, settings)
    notes = [
        "score: RULER's, by lm-eval's scorer, of the text written greedily; in brackets: 95 % Wilson interval over "
        "documents.",
        "answer tokens right: of the answers' tokens, those that are the likeliest given the true ones before them.",
        "likelier than a wrong answer: documents whose answer has a lower loss a token than that of another document.",
        "retrieved: of what was planted outside the window, the share that lies in chunks retrieved for the question.",
        "cost: keys and values held, and time from the text to the end of the prompt: medians over documents, and the "
        "mean of these over tasks.",
        "tokens: the most a document was to have, with room for an answer; lm-eval's functions come near it in steps "
        "(prompt_tokens, in the file: what prompts have).",
    ]
    if style:
        notes.append("RULER-style: RULER's task, its needles planted in another text than RULER's essays.")
    figure = draw_ruler(data, shown, settings, title)
    return Report(f"RULER: {title}", [*notes, *[STAND_IN] * stand_in], tables, data, {"ruler": figure})


def _summary(task: str, length: int, setting: str, of: Sequence[Measurement]) -> TableRow:
    row: TableRow = {"task": task, "tokens": length, "memory": setting, "documents": len(of)}
    row["prompt_tokens"] = sum(r["prompt"] for r in of) / len(of)
    needles = sum(r.get("needles", 0) for r in of)
    shares: dict[str, float | None] = {
        "score": sum(r["score"] for r in of) / len(of),
        "tokens_right": sum(r["right_tokens"] for r in of) / sum(r["tokens"] for r in of),
        "beats_wrong": sum(r["beats_wrong"] for r in of) / len(of),
        "retrieved": sum(r.get("retrieved", 0) for r in of) / needles if needles else None,
    }
    for name, share in shares.items():
        value, low, high = (None, None, None) if share is None else wilson(share, len(of))
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    row["nll_per_token"] = sum(r["nll"] for r in of) / sum(r["tokens"] for r in of)
    return row | {"megabytes": megabytes(of), "seconds": seconds(of)}


def _costs(data: Sequence[TableRow], lengths: Sequence[int], settings: Sequence[str]) -> list[TableRow]:
    """What each way costs, the mean over tasks."""
    rows = []
    for length in lengths:
        for setting in settings:
            of = [r for r in data if (r["tokens"], r["memory"]) == (length, setting)]
            if of:
                means = {
                    name: None if None in (all_ := [r[name] for r in of]) else sum(all_) / len(all_)
                    for name in ("megabytes", "seconds")
                }
                rows.append({"tokens": f"{length:,}", "memory": setting, **cost_columns(means)})
    return rows


def _table(
    data: Sequence[TableRow], measure: str, tasks: Sequence[str], lengths: Sequence[int], settings: Sequence[str]
) -> list[TableRow]:
    by = {(r["task"], r["tokens"], r["memory"]): r for r in data}
    rows = []
    for length in lengths:
        for setting in settings:
            cells = {task: by.get((task, length, setting)) for task in tasks}
            there = {task: row for task, row in cells.items() if row is not None and row[measure] is not None}
            if not there:
                continue
            row: TableRow = {"tokens": f"{length:,}", "memory": setting}
            row["documents"] = str(max(r["documents"] for r in there.values()))
            row |= {task: _shown(there[task], measure) if task in there else "" for task in tasks}
            whole = len(there) == sum(any(r[measure] is not None and r["task"] == t for r in data) for t in tasks)
            row["mean"] = f"{100 * sum(r[measure] for r in there.values()) / len(there):.0f}" if whole else ""
            rows.append(row)
    empty = [task for task in tasks if not any(row[task] for row in rows)]
    return [{name: cell for name, cell in row.items() if name not in empty} for row in rows]


def _shown(row: TableRow, measure: str) -> str:
    value, low, high = (100 * row[name] for name in (measure, f"{measure}_low", f"{measure}_high"))
    return f"{value:.0f} ({low:.0f}..{high:.0f})"


def draw_ruler(data: Sequence[Mapping[str, Any]], tasks: Sequence[str], settings: Sequence[str], title: str) -> Figure:
    """A column of panels a task, a row a measure: shares with their intervals over the length.

    Args:
        data: As :func:`report_ruler` has them.
        tasks: As they are called in the data.
        settings: Ways of choosing memory.
        title: What was measured.
    """
    measures = [m for m in MEASURES if any(r[m] is not None for r in data)]
    figure = Figure(figsize=(1.9 * len(tasks) + 1.8, 1.7 * len(measures) + 0.9), layout="constrained")
    panels = figure.subplots(len(measures), len(tasks), squeeze=False, sharex=True, sharey=True)
    drawn, lengths = looks(settings), sorted({r["tokens"] for r in data})
    for line, measure in enumerate(measures):
        for column, task in enumerate(tasks):
            axes = panels[line, column]
            of_task = [r for r in data if r["task"] == task and r[measure] is not None]
            if not of_task:
                axes.text(0.5, 0.5, "cannot be told", transform=axes.transAxes, ha="center", fontsize=8, color="0.5")
            for number, setting in enumerate(settings):
                points = [r for r in of_task if r["memory"] == setting]
                # Side by side, as many are 0 or 100.
                x = [r["tokens"] * 1.06 ** (number - (len(settings) - 1) / 2) for r in points]
                y = [100 * r[measure] for r in points]
                bars = [[100 * (r[measure] - r[f"{measure}_low"]) for r in points],
                        [100 * (r[f"{measure}_high"] - r[measure]) for r in points]]  # fmt: skip
                if points:
                    axes.errorbar(x, y, yerr=bars, **drawn[setting], markersize=4, capsize=2, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
            axes.set_xticks(lengths, [short_tokens(n) for n in lengths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(-4, 104)
            axes.grid(alpha=0.3)
            if line == 0:
                axes.set_title(task.replace(" (", "\n("), fontsize=9)
        panels[line, 0].set_ylabel(MEASURES[measure].replace(" a wrong", "\na wrong").replace(" [", "\n["), fontsize=8)
    handles = [panels[0, 0].plot([], [], **drawn[s], markersize=4, label=s)[0] for s in settings]
    figure.legend(handles=handles, title="memory", fontsize=8, loc="outside right center")
    figure.supxlabel("tokens", fontsize=9)
    figure.suptitle(f"RULER: {title}", fontsize=11)
    return figure
