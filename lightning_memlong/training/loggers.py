"""Loggers: TensorBoard's writers, and every logged number of a run as ``metrics.csv`` beside their events."""

import csv
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch.utils.tensorboard import SummaryWriter


def tensorboard_writers(loggers: list[Any]) -> list[SummaryWriter]:
    """Of those loggers that write for TensorBoard; in other processes than the first, what they give does nothing."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


class MetricsCSV(CSVLogger):
    """Lightning's CSVLogger in the folder of another logger, with the rows of a resumed run kept.

    Args:
        beside: The logger whose folder it shares.
    """

    def __init__(self, beside: TensorBoardLogger) -> None:
        super().__init__(beside.root_dir, name="", version=beside.version)
        self._beside = beside

    @property
    def log_dir(self) -> str:
        """The folder of the run."""
        return self._beside.log_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _KeptRows(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the folder holds ``config.yaml``."""


class _KeptRows(ExperimentWriter):
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
            kept = [row for row in self._found if int(row["step"]) < step]
            with self._fs.open(self.metrics_file_path, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(kept)
        self._found = []
        super().log_metrics(metrics_dict, step)
