"""One checkpoint to go on from, always the newest."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memlong.training.lightning_private import last_saved_step, save_last


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every so many steps and, unlike Lightning's own, at the end of training.

    To keep the best of several as well, add a ``ModelCheckpoint`` that monitors ``val/perplexity``.

    Args:
        every_n_train_steps: Optimiser steps between saves; also what a killed run loses at most [steps].
    """

    def __init__(self, every_n_train_steps: int = 100) -> None:
        super().__init__(every_n_train_steps=every_n_train_steps, save_last=True, save_top_k=0)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the final weights, unless the last step was saved already."""
        if last_saved_step(self) != trainer.global_step:
            save_last(self, trainer)
