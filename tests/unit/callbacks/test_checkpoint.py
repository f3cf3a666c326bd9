"""When the last checkpoint is written."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.checkpoint import LastCheckpoint
from lightning_memlong.errors import UserError


@pytest.mark.parametrize(("minutes", "saves"), [(1e-9, 6), (60.0, 1)])
def test_it_saves_by_time_and_at_the_end(minutes: float, saves: int, tmp_path: Path) -> None:
    callback, saved = LastCheckpoint(every_minutes=minutes), list[int]()

    class Count(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: object) -> None:
            saved.append(trainer.global_step)

    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, callbacks=[callback, Count()], default_root_dir=tmp_path, logger=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert len(saved) == saves and saved[-1] == 6 and len(set(saved)) == saves


def test_it_saves_no_half_of_a_step(tmp_path: Path) -> None:
    """Gradients that are not complete are in no checkpoint: whatever the time, it waits for the end of the step."""
    callback, saved = LastCheckpoint(every_minutes=60), list[tuple[int, int]]()

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx in (4, 8):  # the first and the last window of a step
                callback._last_time_checked = -1e9

        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: object) -> None:
            saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.processed))

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=10, callbacks=[Watch(), callback], logger=False,
        default_root_dir=tmp_path, limit_val_batches=0, accumulate_grad_batches=3, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert saved == [(2, 6), (3, 9), (4, 10)], "the tenth window is a step of its own"


@pytest.mark.parametrize(("every", "others", "told"), [(4, 1, True), (6, 1, False), (4, 0, False), (1.0, 1, False)])
def test_validation_within_a_step_is_told_where_it_saves(
    every: Any, others: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [LastCheckpoint(), *(ModelCheckpoint(tmp_path) for _ in range(others))]
    trainer = L.Trainer(
        accelerator="cpu", callbacks=callbacks, val_check_interval=every, accumulate_grad_batches=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    callbacks[0].on_train_start(trainer, BoringModel())
    assert ("may hold half a step" in caplog.text) == told


def test_steps_win_over_time() -> None:
    callback = LastCheckpoint(every_minutes=2, every_n_train_steps=7)
    assert callback._every_n_train_steps == 7 and callback._train_time_interval is None
    assert LastCheckpoint()._train_time_interval == timedelta(minutes=5)
    for settings in ({"every_minutes": 0}, {"every_n_train_steps": 0}):
        with pytest.raises(UserError, match="trainer.callbacks.every_"):
            LastCheckpoint(**settings)
