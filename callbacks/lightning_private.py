"""All that the callbacks use of Lightning's own inside, for which it has no public name; here alone it can break.

``tests/unit/callbacks/test_lightning_private.py`` fails by name when a release changes one of them.
"""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar


def last_saved_step(checkpoint: ModelCheckpoint) -> int:
    """Optimiser steps there had been when the callback saved last.

    Public are the files' names alone, and ``last.ckpt`` has the same one at every step.
    """
    return checkpoint._last_global_step_saved


def save_last(checkpoint: ModelCheckpoint, trainer: L.Trainer) -> None:
    """Write ``last.ckpt`` now.

    ``trainer.save_checkpoint`` writes a file too, but then the callback knows neither its name, which is part of what
    it saves, nor that loggers are to be told.
    """
    checkpoint._save_last_checkpoint(trainer, dict(trainer.callback_metrics))


class EpochProgressBar(RichProgressBar):
    """Rich's bar of training with the number of the epoch alone before it.

    The original names the last epoch as well, which is -2 where steps, not epochs, end training.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"
