"""Lightning's switches: what a configuration brings and a switch forbids is left out, and told."""

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
SWITCHES: dict[str, tuple[bool, tuple[type[Callback], ...]]] = {
    "logger": (False, LOGGING),
    "enable_checkpointing": (False, (Checkpoint,)),
    "enable_progress_bar": (False, (ProgressBar,)),
    "enable_model_summary": (False, (ModelSummary,)),
    "barebones": (True, (*LOGGING, Checkpoint, ProgressBar, ModelSummary)),
}
"""Of each, at which value it forbids something, and what."""


def leave_out_forbidden(options: Any) -> None:
    """Take out of the Trainer's options what its switches forbid, where Lightning ends in an error.

    Args:
        options: By name; callbacks are built already. Changed in place.
    """
    given = options.get("callbacks") or []
    callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
    for switch, (value, kinds) in SWITCHES.items():
        if options.get(switch) is not value:
            continue
        out = [c for c in callbacks if isinstance(c, kinds)]
        callbacks = [c for c in callbacks if c not in out]
        names = [type(c).__name__ for c in out]
        if switch == "barebones":
            names += [name for name, needed in BAREBONES.items() if options.get(name) != needed]
            for name, needed in BAREBONES.items():
                options[name] = needed
        if names:
            say(f"trainer.{switch} {str(value).lower()}: left out {', '.join(names)}")
    options["callbacks"] = callbacks
