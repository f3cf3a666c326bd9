"""What the command line tells a person: tables, and where things are."""

import csv
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.utilities.model_summary import get_formatted_model_size, get_human_readable_count
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from rich import get_console
from rich.console import Console
from rich.table import Table

from lightning_memlong.backbone import describe, spans
from lightning_memlong.evaluation.base import Report
from lightning_memlong.evaluation.figures import draw_layers
from lightning_memlong.memlong import MemLong
from lightning_memlong.training.loggers import show_figure, show_text


def wide_console(beside: bool = False) -> Console:
    """Wide enough for our tables wherever output goes.

    Args:
        beside: On stderr, beside what is piped on.
    """
    return Console(width=max(100, Console().width), stderr=beside)


class ParameterSummary(RichModelSummary):
    """Lightning's table of the module's parts, without its count of FLOPs, which is 0 before anything has run."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table, and under it how much is trained."""
        columns = {name: values for name, values in summary_data if name != "FLOPs"}
        table = Table(header_style="bold magenta")
        for name in columns:
            table.add_column(name, justify="right" if name.startswith("Params") else "left")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        out = get_console()  # that of the progress bar
        out.print(table)
        counts = (trainable_parameters, total_parameters - trainable_parameters, total_parameters)
        for what, count in zip(("Trainable", "Non-trainable", "Total"), counts, strict=True):
            out.print(f"{what} params: {get_human_readable_count(int(count))}", highlight=False)
        out.print(f"Total estimated model params size (MB): {get_formatted_model_size(model_size)}", highlight=False)
        out.print(f"Modules in train mode: {total_training_modes['train']}", highlight=False)
        out.print(f"Modules in eval mode: {total_training_modes['eval']}", highlight=False)


@rank_zero_only
def show_parameters(model: MemLong) -> None:
    """The layers' parts, and every trained parameter with its shape and count."""
    trained = model.trainable()
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained.values())
    what = "each its own keys and values" if model.layout.source == "per_layer" else "those of the memory layer"
    table = Table(title=f"Trained: {count:,} of {total:,} parameters ({count / total:.2%})", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape")
    table.add_column("numbers", justify="right")
    for name, shape, numbers in describe(trained):
        table.add_row(name, shape, f"{numbers:,}")
    out = wide_console()
    out.print(
        f"Memory layer {model.memory_layer}: it and all below are frozen. Memory is read in layers "
        f"{spans(model.retrieval_layers)}, {what}, {model.layout.fusion}.",
        soft_wrap=True,
    )
    out.print(table if trained else "Trained: nothing.")


@rank_zero_only
def show_perplexity(
    title: str, rows: dict[str, dict[str, float]], memory: str | None, folder: Path | None, logdir: Path | None
) -> None:
    """Perplexity with memory on and off, and the run folder.

    Args:
        title: Of the table.
        rows: Name -> metrics; a single row without a name has no column for it.
        memory: Heading of the column with memory; None: there is none.
        folder: The run's.
        logdir: What to open TensorBoard on; None: it was given nothing.
    """
    table = Table(title=title, title_justify="left")
    named = set(rows) != {""}
    for column in ([""] if named else []) + [memory or "no memory", "memory off", "on / off"]:
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        values = [metrics.get(k) for k in ("perplexity", "perplexity_memory_off", "perplexity_ratio")]
        if values[0] is not None:
            table.add_row(*([name] if named else []), *("-" if v is None else f"{v:.3f}" for v in values))
    out = wide_console()
    out.print(table)
    if folder:
        out.print(f"Run folder: {folder}", soft_wrap=True)
    if logdir:
        out.print(f"Look at it: {_tensorboard()} --logdir {logdir}", soft_wrap=True)


@rank_zero_only
def show_layers(rows: list[dict[str, Any]], title: str, folder: Path) -> Figure:
    """The results of a sweep over layers, as a table here and in ``layers.md``, and as a picture ``layers.png``."""
    columns = list(dict.fromkeys((r["source"], r["readers"]) for r in rows))
    found = {(r["memory_layer"], r["source"], r["readers"]): r["ratio"] for r in rows}
    shown = Table(title=f"Perplexity, memory on / off: {title}", title_justify="left")
    lines = [
        "| memory layer | " + " | ".join(f"{s}, {r}" for s, r in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for column in ("memory layer", *(f"{source}\n{readers}" for source, readers in columns)):
        shown.add_column(column, justify="right")
    for layer in sorted({r["memory_layer"] for r in rows}):
        cells = [found.get((layer, *column)) for column in columns]
        texts = [str(layer), *("" if c is None else f"{c:.4f}" for c in cells)]
        shown.add_row(*texts)
        lines.append("| " + " | ".join(texts) + " |")
    off = rows[0]["perplexity_memory_off"]
    (folder / "layers.md").write_text(f"{title}; perplexity with memory off: {off:.3f}\n\n" + "\n".join(lines) + "\n")
    figure = draw_layers(rows, title)
    figure.savefig(folder / "layers.png", dpi=120)
    out = wide_console()
    out.print(shown)
    out.print(f"Memory off: {off:.3f}. Written: {folder}/layers.csv, layers.md, layers.png", soft_wrap=True)
    return figure


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of the same columns as a file."""
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def markdown(report: Report, name: str) -> str:
    """A report as a Markdown file, with the figures that lie beside it as ``name-figure.png``."""
    lines = [f"# {report.title}", ""]
    for title, rows in report.tables.items():
        if rows:
            lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
            lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
            lines.append("")
    lines += [f"- {note}" for note in report.notes]
    lines += [line for title in report.figures for line in ("", f"![{title}]({quote(f'{name}-{title}.png')})")]
    return "\n".join(lines) + "\n"


def write_report(report: Report, name: str, folder: Path, loggers: list[Any]) -> None:
    """Write ``name.md``, ``name.csv``, ``name-figure.png``, and give the same to loggers."""
    text = markdown(report, name)
    (folder / f"{name}.md").write_text(text)
    write_csv(folder / f"{name}.csv", report.data)
    for title, figure in report.figures.items():
        figure.savefig(folder / f"{name}-{title}.png", dpi=110)
    show_text(loggers, f"{name}/tables", text)
    for title, figure in report.figures.items():
        show_figure(loggers, f"{name}/{title}", figure)
    for logger in loggers:
        logger.save()


@rank_zero_only
def show_report(report: Report, name: str, folder: Path, logdir: Path | None) -> None:
    """The tables of a report, how to read them, where they are, and what to open TensorBoard on."""
    out = Console(width=max(150, Console().width))
    for title, rows in report.tables.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left", caption_justify="left")
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        out.print(table)
    for note in report.notes:
        out.print(note, soft_wrap=True)
    files = ", ".join([f"{name}.md", f"{name}.csv", *(f"{name}-{title}.png" for title in report.figures)])
    out.print(f"Written: {folder}/: {files}", soft_wrap=True)
    if logdir:
        out.print(f"Look at it: {_tensorboard()} --logdir {logdir}", soft_wrap=True)


def _tensorboard() -> str:
    """How to call TensorBoard from here, whether or not its environment is activated."""
    beside = Path(sys.executable).parent / "tensorboard"
    if not beside.exists():
        return "tensorboard"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
