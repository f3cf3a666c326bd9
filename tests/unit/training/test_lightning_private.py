"""What the callbacks use of Lightning's inside is still there, and still does what it did."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from callbacks.checkpoint import LastCheckpoint
from callbacks.progress import ProgressBar
from lightning_memlong.training.lightning_private import (
    EpochProgressBar,
    KeptRowsWriter,
    claim_version,
    hide_later_events,
    last_saved_step,
)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (ModelCheckpoint, "_save_last_checkpoint", ["self", "trainer", "monitor_candidates"]),
        (RichProgressBar, "_get_train_description", ["self", "current_epoch"]),
    ],
)
def test_a_private_method_is_there(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters, f"Lightning changed {name}"


def test_a_logger_tells_its_writer_what_to_forget(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    hide_later_events(logger, 7)
    logger.experiment.add_scalar("x", 1.0, 7)
    logger.experiment.close()
    told = EventFileLoader(str(next(tmp_path.rglob("events*")))).Load()
    assert any(e.session_log.status == SessionLog.START and e.step == 7 for e in told), "Lightning changed _kwargs"


def test_a_checkpoint_callback_knows_when_it_saved() -> None:
    assert last_saved_step(ModelCheckpoint()) == 0, "Lightning changed _last_global_step_saved"


@pytest.mark.parametrize("steps", [4, 5])
def test_the_last_step_is_saved_once(steps: int, tmp_path: Path) -> None:
    """By the callback itself, or after training."""
    callback = LastCheckpoint(every_n_train_steps=2)
    saved: list[int] = []

    class Count(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: object) -> None:
            saved.append(trainer.global_step)

    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=steps, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, limit_val_batches=0, callbacks=[callback, Count()],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert saved == [*range(2, steps, 2), steps] and last_saved_step(callback) == steps
    kept = torch.load(callback.last_model_path, weights_only=True)
    assert kept["global_step"] == steps and Path(callback.last_model_path).name == "last.ckpt"


def test_the_bar_of_training_names_its_epoch_alone() -> None:
    """The method is asked by Lightning's bar; the name of the last epoch, -2, is left out."""
    assert issubclass(ProgressBar, EpochProgressBar)
    assert "_get_train_description" in inspect.getsource(RichProgressBar.on_train_epoch_start)
    assert ProgressBar()._get_train_description(3) == "Epoch 3"


@pytest.mark.parametrize("name", ["_check_log_dir_exists", "log_metrics"])
def test_the_csv_writer_is_extended_where_it_was(name: str) -> None:
    assert callable(getattr(ExperimentWriter, name)), f"Lightning changed {name} of its CSV writer"


def test_rows_of_a_file_that_is_there_are_kept(tmp_path: Path) -> None:
    for steps in ([1, 2, 3], [3, 4]):
        writer = KeptRowsWriter(str(tmp_path))
        for step in steps:
            writer.log_metrics({"loss": float(10 * len(steps) + step)}, step)
        writer.save()
    rows = (tmp_path / "metrics.csv").read_text().split()
    assert rows == ["loss,step", "31.0,1", "32.0,2", "23.0,3", "24.0,4"]
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("25.0")  # cut short by whatever ended the run
    writer = KeptRowsWriter(str(tmp_path))
    writer.log_metrics({"loss": 15.0}, 5)
    writer.save()
    assert (tmp_path / "metrics.csv").read_text().split() == [*rows, "15.0,5"]


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="memlong") for _ in range(8)]
    begin = threading.Barrier(len(loggers))

    def claim(logger: TensorBoardLogger) -> None:
        begin.wait()
        claim_version(logger)

    with ThreadPoolExecutor(len(loggers)) as pool:
        list(pool.map(claim, loggers))
    assert {Path(logger.log_dir).name for logger in loggers} == {f"version_{i}" for i in range(8)}
    asked = TensorBoardLogger(tmp_path, name="memlong", version=3)
    claim_version(asked)
    assert asked.version == 3, "a number that was asked for stays"
