"""Lightning's switches and callbacks: what cannot be is left out, and told, or refused by name with its reason."""

from typing import Any, get_args, get_type_hints

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    ProgressBar,
)

from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError

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
REFUSED: dict[type[Callback], tuple[str, str]] = {
    BackboneFinetuning: (
        "layers up to model.memory_layer stay frozen: keys and values in memory are theirs", "choose with model.tuning",
    ),
    BaseFinetuning: ("it says nothing of what it freezes, a class of your own made from it does", "name that class"),
    BatchSizeFinder: (
        "each try would need a memory of as many rows from the documents' beginning", "try --data.batch_size 1, 2, 4",
    ),
    LearningRateFinder: (
        "the rate is the optimiser's, and biases have their own", "search with conf/sweeps: model.optimizer.lr",
    ),
    ModelPruning: (
        "it puts other parameters in the place of weights, frozen ones too, which checkpoints and banks know by name",
        "prune an exported folder, and use it as model.backbone",
    ),
}  # fmt: skip
"""Callbacks of Lightning's that cannot work here: why, and what to do instead."""


def refuse_impossible(callbacks: list[Callback]) -> None:
    """See that no callback is of a kind that cannot work with a memory.

    Raises:
        UserError: If one is.
    """
    for callback in callbacks:
        if (refused := REFUSED.get(type(callback))) is not None:
            why, fix = refused
            raise UserError(
                f"trainer.callbacks={type(callback).__name__}: {why}. Allowed: Lightning's others, and your own. "
                f"Fix: leave it out; {fix}."
            )


def _require_values(options: Any) -> None:
    """The parser takes null for anything; see that no option of the Trainer has it that cannot be null.

    Raises:
        UserError: If one has.
    """
    for name, hint in get_type_hints(L.Trainer.__init__).items():
        if name in options and options[name] is None and type(None) not in get_args(hint) and name != "return":
            require(False, f"trainer.{name}", None, "a value", "give one, or leave it out for Lightning's default")


def _one_progress_bar(callbacks: list[Callback]) -> list[Callback]:
    """Lightning takes one: the last, which a person asked for after the configuration did."""
    bars = [c for c in callbacks if isinstance(c, ProgressBar)]
    if len(bars) > 1:
        names = ", ".join(type(bar).__name__ for bar in bars[:-1])
        say(f"trainer.callbacks: left out {names}, for {type(bars[-1]).__name__}")
    return [c for c in callbacks if c not in bars[:-1]]


def leave_out_forbidden(options: Any) -> None:
    """Take out of the Trainer's options what its switches forbid, where Lightning ends in an error.

    Args:
        options: By name; callbacks are built already. Changed in place.

    Raises:
        UserError: If a callback cannot work at all.
    """
    _require_values(options)
    given = options.get("callbacks") or []
    callbacks: list[Callback] = _one_progress_bar(list(given) if isinstance(given, list) else [given])
    refuse_impossible(callbacks)
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
