"""Settings a model was stored with, in a checkpoint or beside exported weights, and how they meet those of a run."""

import logging
from pathlib import Path
from typing import Any

import torch

from lightning_memlong.config import flat, require
from lightning_memlong.errors import UserError
from lightning_memlong.training.module import CHECKPOINT_FORMAT, MemLongModule

log = logging.getLogger("lightning_memlong")


def read_checkpoint(path: Path, given: str) -> dict[str, Any]:
    """A checkpoint of train.py, memory-mapped.

    Args:
        path: The file.
        given: What was typed, for messages.

    Raises:
        UserError: If it is not there, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(
            f"ckpt_path={given!r} is not a file. Allowed: last, or the path of a .ckpt file. Fix: correct it."
        )
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise UserError(
            f"ckpt_path={given!r} cannot be read as a checkpoint ({type(error).__name__}). Allowed: a whole "
            ".ckpt file written by fit. Fix: give another, it may have been cut short."
        ) from error
    if "memlong" not in checkpoint:
        raise UserError(
            f"ckpt_path={given!r} is not a MemLong checkpoint. Allowed: one written by train.py fit. Fix: give another."
        )
    if (found := checkpoint["memlong"].get("format", 1)) != CHECKPOINT_FORMAT:
        raise UserError(
            f"ckpt_path={given!r} is of format {found}. Allowed: {CHECKPOINT_FORMAT}. Fix: use the release "
            "that wrote it, or train again."
        )
    return checkpoint


def load_weights(module: MemLongModule, path: str, complete: bool) -> None:
    """Give a module the trained weights of a checkpoint.

    Args:
        module: The module.
        path: The file.
        complete: Whether it must hold all that the module trains.

    Raises:
        UserError: If it cannot be read, or belongs to another backbone or other settings.
    """
    checkpoint = read_checkpoint(Path(path), path)
    module.check_checkpoint(checkpoint, complete)
    module.load_state_dict(checkpoint["state_dict"], strict=False)


def on_device(trainer: Any, module: MemLongModule, ckpt_path: str | None) -> tuple[MemLongModule, Any]:
    """A module where and how a run computes, for what Lightning has no loop for, and the memory callback.

    Args:
        trainer: Gives device and precision.
        module: The module.
        ckpt_path: Checkpoint whose weights it gets, if any.

    Raises:
        UserError: If there are several devices, memory is switched off, or the checkpoint belongs to another model.
    """
    require(trainer.world_size == 1, "trainer.devices", trainer.world_size, "1", "use one device")
    callback = trainer.memory_callback()
    require(
        callback is not None, "memory.enabled", False, "true: nothing can be compared or kept without", "leave it out"
    )
    if ckpt_path is not None:
        load_weights(module, ckpt_path, complete=False)
    return trainer.precision_plugin.convert_module(module).to(trainer.strategy.root_device).eval(), callback


def stored_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the network is; the recipe (optimiser, schedule) is a run's and is not in there."""
    return {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}


def note_differences(
    stored: dict[str, Any], before: dict[str, Any], after: dict[str, Any], whose: str
) -> dict[str, dict[str, Any]]:
    """Say where stored settings and those of the run's configuration differ, and which are used.

    Args:
        stored: The settings that came with the weights.
        before: The run's model settings without them.
        after: The run's model settings with them.
        whose: What they came with: ``checkpoint`` or ``export``.

    Returns:
        The same, by option.
    """
    notes = {}
    for key, kept in flat(stored).items():
        asked, used = flat(before).get(key), flat(after).get(key)
        if kept == asked == used:
            continue
        notes[f"model.{key}"] = {whose: kept, "config": asked, "used": used}
        choice = f"the {whose}'s is used" if used == kept else "what you typed is used"
        log.info("model.%s: %s %r, this run's configuration %r; %s", key, whose, kept, asked, choice)
    return notes
