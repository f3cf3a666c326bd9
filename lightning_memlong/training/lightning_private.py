"""What is used of Lightning and jsonargparse beyond what they promise, in one place, so that one place breaks.

Each with what for and why. ``tests/unit/training/test_lightning_private.py`` and ``test_command_line_private.py`` fail
by name when a release changes one of them.
"""

import argparse
import csv
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

# ---- callbacks ----------------------------------------------------------------------------------------------


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


def log_by_optimiser_steps(trainer: L.Trainer) -> None:
    """Let loggers count optimiser steps, before a batch is trained on.

    They do, but for a run that goes on from the end of another: where validation was due there, Lightning passes over
    it with a batch that is none, and its count, ``_batches_that_stepped``, is one ahead from then on.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def hide_later_events(logger: TensorBoardLogger, step: int) -> None:
    """Let TensorBoard forget what it was told of a step and those after it, before a resumed run tells it again.

    SummaryWriter's ``purge_step``; needs ``_kwargs``, what it is made with: given to the logger, it would be part of
    the saved configuration.
    """
    logger._kwargs["purge_step"] = step


class EpochProgressBar(RichProgressBar):
    """Rich's bar of training with the number of the epoch alone before it.

    The original names the last epoch as well, which is -2 where steps, not epochs, end training.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"


# ---- loggers ------------------------------------------------------------------------------------------------


class KeptRowsWriter(ExperimentWriter):
    """Goes on with a file that is there, where Lightning's deletes it; needs its ``_check_log_dir_exists`` and ``_fs``.

    Everything else of its writer (columns that come later, file systems that are not local) stays in use.
    """

    def _check_log_dir_exists(self) -> None:
        self._found: list[dict[str, str]] = []
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self._found = list(csv.DictReader(file))
            self.metrics_keys = list(self._found[0]) if self._found else []

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Add a row; the first one after a resume takes the place of those of its step and later."""
        if self._found and step is not None:
            # The last row may have been cut short by whatever ended the run.
            kept = [row for row in self._found if (row["step"] or "").isdigit() and int(row["step"]) < step]
            with self._fs.open(self.metrics_file_path, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(kept)
        self._found = []
        super().log_metrics(metrics_dict, step)


def keep_rows(logger: CSVLogger) -> None:
    """Let a logger go on with the file of a run that is resumed; needs its ``_experiment``.

    A class of our own would have another name than the one in the configuration.
    """
    logger._experiment = KeptRowsWriter(logger.log_dir)


def claim_version(logger: TensorBoardLogger) -> None:
    """Make the run folder of a logger that chooses its number itself, before another run takes the same one.

    Lightning looks for the highest number and makes the folder when something is first written, so that two runs that
    begin together write into one. Needs ``_version`` and ``_get_next_version``: a number given as ``version`` would be
    part of the saved configuration, and a run of that would write over the first.
    """
    while logger._version is None:
        logger._version = logger._get_next_version()
        try:
            Path(logger.log_dir).mkdir(parents=True)
        except FileExistsError:  # by another run, a moment ago
            logger._version = None


# ---- the command line ---------------------------------------------------------------------------------------


class CheckpointAwareCLI(LightningCLI):
    """LightningCLI, with hooks where it has none."""

    argv: list[str]
    """Arguments; set before LightningCLI begins."""
    NAMES: tuple[str, ...] = ()
    """Of all subcommands."""

    def _parse_ckpt_path(self) -> None:
        # Needed: Lightning puts a checkpoint's hyperparameters over what was typed, silently; here they go under it.
        # Not public: nothing switches it off, and it runs between parse_arguments and the first public hook.
        self.merge_stored_settings()

    @abstractmethod
    def merge_stored_settings(self) -> None:
        """Change ``self.config``, which has been parsed and from which nothing has been built yet."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommands and the arguments they do not expose; only the one asked for, as each costs start-up time."""
        # Needed: the arguments, to know which is asked for. Not public: Lightning declares a static method, which knows
        # no arguments; that it asks its instance, and not its class, is not promised.
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        asked = [argument for argument in self.argv if argument in self.NAMES][:1]
        return {name: hidden for name in asked or self.NAMES}


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments a parser has."""
    # Needed: their names, to suggest the nearest, and their help, to correct Lightning's. Not public: argparse hands an
    # action to who adds it, and here that is Lightning; jsonargparse's get_defaults() knows no subcommands.
    return parser._actions


def all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    for action in actions(parser):
        yield action
        if isinstance(action.choices, dict):  # a subcommand is a choice of a parser
            for subcommand in action.choices.values():
                yield from actions(subcommand)
