"""What the command line tells a person: tables, and where things are."""

import os
import sys
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_memlong.model import MemLong
from lightning_memlong.tuning import describe, spans


def console() -> Console:
    """Wide enough for our tables wherever output goes."""
    return Console(width=max(100, Console().width))


@rank_zero_only
def show_parameters(model: MemLong) -> None:
    """The layers' parts, and every trained parameter with its shape and count."""
    trained = model.trainable()
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained.values())
    what = "each its own keys and values" if model.source == "per_layer" else "those of the memory layer"
    table = Table(title=f"Trained: {count:,} of {total:,} parameters ({count / total:.2%})", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape")
    table.add_column("numbers", justify="right")
    for name, shape, numbers in describe(trained):
        table.add_row(name, shape, f"{numbers:,}")
    out = console()
    out.print(
        f"Memory layer {model.memory_layer}: it and all below are frozen. Memory is read in layers "
        f"{spans(model.retrieval_layers)}, {what}, {model.fusion}.",
        soft_wrap=True,
    )
    out.print(table if trained else "Trained: nothing.")


@rank_zero_only
def show_perplexity(title: str, rows: dict[str, dict[str, float]], memory: str | None, folder: Path | None) -> None:
    """Perplexity with memory on and off, and the run folder.

    Args:
        title: Of the table.
        rows: Name -> metrics.
        memory: Heading of the column with memory; None: there is none.
        folder: The run's.
    """
    table = Table(title=title, title_justify="left")
    for column in ("", memory or "no memory", "memory off", "on / off"):
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        values = [metrics.get(k) for k in ("perplexity", "perplexity_memory_off", "perplexity_ratio")]
        if values[0] is not None:
            table.add_row(name, *("-" if v is None else f"{v:.3f}" for v in values))
    out = console()
    out.print(table)
    if folder:
        out.print(f"Run folder: {folder}", soft_wrap=True)
        out.print(f"Look at it: {_tensorboard()} --logdir {folder.parent}", soft_wrap=True)


def _tensorboard() -> str:
    """How to call TensorBoard from here, whether or not its environment is activated."""
    beside = Path(sys.executable).parent / "tensorboard"
    if not beside.exists():
        return "tensorboard"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
