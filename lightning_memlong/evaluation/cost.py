"""What each way of using a long text costs: keys and values held, and seconds from the text to its last losses."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_memlong.backbone import text_config
from lightning_memlong.evaluation.base import Subject, TableRow
from lightning_memlong.evaluation.record import Measurement


def now(device: torch.device) -> float:
    """Seconds on a clock, once a device has done what it was asked to [s]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def token_bytes(backbone: Any, layers: int | None = None, element: int = 4) -> int:
    """Bytes of the keys and values of one token.

    Args:
        backbone: Whose heads.
        layers: How many; None: all of them.
        element: Bytes of a number.
    """
    config = text_config(backbone)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * size * (config.num_hidden_layers if layers is None else layers) * element


def computing_bytes(subject: Subject) -> int:
    """Bytes of a number of the keys and values that the model computes."""
    kind = subject.device.type
    with subject.autocast():
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind).itemsize
    return next(subject.model.parameters()).dtype.itemsize


def memory_bytes(subject: Subject, local: int, length: int) -> int:
    """Bytes of the keys and values of a window, of all layers, and of the text before it in a bank, of those stored."""
    element = computing_bytes(subject)
    dtype = subject.memory.dtype
    stored = element if dtype == "auto" else getattr(torch, dtype).itemsize
    model = subject.model
    window = min(local, length) * token_bytes(model.backbone, element=element)
    bank = max(0, length - local) * token_bytes(model.backbone, len(model.layout.stored_layers), stored)
    return window + bank


def megabytes(rows: Sequence[Measurement]) -> float | None:
    """Keys and values held, the mean over measurements [MB]; None: not known."""
    known = [r["held"] for r in rows if r.get("held")]
    return float(np.mean(known)) / 1e6 if known else None


def seconds(rows: Sequence[Measurement]) -> float | None:
    """From the text to the losses of its last tokens, the median over measurements [s]; None: not known."""
    known = [r["seconds"] for r in rows if r.get("seconds") is not None]
    return float(np.median(known)) if known else None


def cost_columns(row: TableRow) -> TableRow:
    """The columns of a table that say what a way costs."""
    held, took = row["megabytes"], row["seconds"]
    return {
        "keys and values [MB]": "" if held is None else f"{held:,.0f}",
        "time [s]": "" if took is None else f"{took:,.1f}",
    }
