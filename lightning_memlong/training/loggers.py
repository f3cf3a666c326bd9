"""Loggers: TensorBoard's writers, and every logged number of a run as ``metrics.csv`` beside their events."""

from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from lightning_memlong.training.lightning_private import KeptRowsWriter, claim_version


def tensorboard_writers(loggers: list[Any]) -> list[SummaryWriter]:
    """Of those loggers that write for TensorBoard; in other processes than the first, what they give does nothing."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


@rank_zero_only
def claim_folders(loggers: list[Any]) -> None:
    """Make the run folders of TensorBoard's loggers, each of them no other run's; other processes are told them."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            claim_version(logger)


class MetricsCSV(CSVLogger):
    """Lightning's CSVLogger in the folder of another logger, with the rows of a resumed run kept.

    Args:
        beside: The logger whose folder it shares.
    """

    def __init__(self, beside: TensorBoardLogger) -> None:
        super().__init__(beside.root_dir, name="", version="")  # its folder is asked for late: see claim_version
        self._beside = beside

    @property
    def log_dir(self) -> str:
        """The folder of the run."""
        return self._beside.log_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = KeptRowsWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the folder holds ``config.yaml``."""
