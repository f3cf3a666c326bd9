"""One checkpoint to go on from, always the newest, also after Ctrl-C."""

import logging
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.progress import deferred_interrupt
from lightning_memlong.training.lightning_private import last_saved_step, save_last

log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every so often and, unlike Lightning's own, at the end of training.

    Ctrl-C lets the optimiser step end that is being made, saves it and says how to go on; pressed twice, it stops at
    once. With several processes it stops at once: each would end with another step.

    To keep the best of several as well, add a ``ModelCheckpoint`` that monitors ``val/perplexity``.

    Args:
        every_minutes: Time between saves; also what a killed run loses at most [minutes].
        every_n_train_steps: Optimiser steps between saves instead; null: by time [steps].
    """

    def __init__(self, every_minutes: float = 5.0, every_n_train_steps: int | None = None) -> None:
        key, allowed = "trainer.callbacks.every_", "above 0"
        require(every_minutes > 0, f"{key}minutes", every_minutes, f"{allowed} minutes", "raise it")
        ok = every_n_train_steps is None or every_n_train_steps > 0
        require(ok, f"{key}n_train_steps", every_n_train_steps, f"null, or {allowed} steps", "raise it")
        interval = timedelta(minutes=every_minutes) if every_n_train_steps is None else None
        super().__init__(
            every_n_train_steps=every_n_train_steps, train_time_interval=interval, save_last=True, save_top_k=0
        )
        self._handler = ExitStack()
        self._interrupted = _never

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let Ctrl-C wait for the end of a step."""
        super().on_train_start(trainer, pl_module)
        every, windows = trainer.val_check_interval, trainer.accumulate_grad_batches
        if len(trainer.checkpoint_callbacks) > 1 and isinstance(every, int) and every % windows:
            log.warning(
                "trainer.val_check_interval=%d is no multiple of trainer.accumulate_grad_batches=%d: a checkpoint that "
                "is saved by validation may hold half a step, from which a run does not go on exactly", every, windows,
            )  # fmt: skip
        if trainer.world_size == 1:
            self._interrupted = self._handler.enter_context(deferred_interrupt())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if it is time; after Ctrl-C save and stop.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # gradients that are not complete yet are in no checkpoint, so its time comes at the end of the step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._interrupted():
            return
        if last_saved_step(self) != trainer.global_step:
            save_last(self, trainer)
        say(f"\nInterrupted after step {trainer.global_step}, which is saved. The same command with --ckpt_path last "
            "goes on from there.", flush=True)  # fmt: skip
        raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the final weights, unless the last step was saved already."""
        if last_saved_step(self) != trainer.global_step:
            save_last(self, trainer)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let Ctrl-C stop at once again."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        self._handler.close()
        self._interrupted = _never


def _never() -> bool:
    return False
