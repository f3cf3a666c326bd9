"""Lightning's switches: what a configuration brings and a switch forbids is left out, and told."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)

from lightning_memlong.distributed import say

LOGGING = (LearningRateMonitor, DeviceStatsMonitor)
"""Callbacks that refuse to work where nothing is logged."""
BAREBONES = {"logger": False, "profiler": None, "log_every_n_steps": None, "num_sanity_val_steps": None}
"""Options of the Trainer that barebones allows no other value of."""
SWITCHES: dict[str, tuple[Callable[[Any], bool], tuple[type[Callback], ...]]] = {
    "logger": (lambda value: value is False, LOGGING),
    "enable_checkpointing": (lambda value: value is False, (Checkpoint,)),
    "enable_progress_bar": (lambda value: value is False, (ProgressBar,)),
    "enable_model_summary": (lambda value: value is False, (ModelSummary,)),
    "barebones": (bool, (*LOGGING, Checkpoint, ProgressBar, ModelSummary)),
}
"""Of each, when it forbids something, and what."""


def leave_out_forbidden(options: Any) -> None:
    """Take out of the Trainer's options what its switches forbid, where Lightning ends in an error.

    Args:
        options: By name; callbacks are built already. Changed in place.
    """
    given = options.get("callbacks") or []
    callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
    for switch, (forbids, kinds) in SWITCHES.items():
        if not forbids(options.get(switch)):
            continue
        out = [c for c in callbacks if isinstance(c, kinds)]
        callbacks = [c for c in callbacks if c not in out]
        names = [type(c).__name__ for c in out]
        if switch == "barebones":
            names += [name for name, value in BAREBONES.items() if options.get(name) != value]
            for name, value in BAREBONES.items():
                options[name] = value
        if names:
            say(f"trainer.{switch} {str(options.get(switch)).lower()}: left out {', '.join(names)}")
    options["callbacks"] = callbacks
