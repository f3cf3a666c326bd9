"""Checkpoints as a command line meets them: their settings beside a run's, their weights where the run computes."""

import logging
from typing import Any

from lightning_memlong.config import flat, require
from lightning_memlong.model import load_weights
from lightning_memlong.training import MemLongModule

log = logging.getLogger("lightning_memlong")


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
        load_weights(module.model, ckpt_path, complete=False, recognised=module.recognised)
    return trainer.precision_plugin.convert_module(module).to(trainer.strategy.root_device).eval(), callback


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
