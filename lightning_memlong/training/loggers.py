"""Loggers: what each is given, and where a run of it lies.

TensorBoard gets everything; of the others, Weights & Biases, MLflow and Comet keep figures and texts among their own,
CSVLogger beside its file.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from lightning_memlong.training.lightning_private import KeptRowsWriter, claim_version, keep_rows

SHOWS = (TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger, CSVLogger)
"""Loggers that keep figures and texts."""


def tensorboard_loggers(loggers: list[Any]) -> list[TensorBoardLogger]:
    """Those that write for TensorBoard."""
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def tensorboard_writers(loggers: list[Any]) -> list[SummaryWriter]:
    """What they write with; in other processes than the first, it does nothing."""
    return [logger.experiment for logger in tensorboard_loggers(loggers)]


# ---- figures, texts, settings -------------------------------------------------------------------------------


def show_anything(loggers: list[Any]) -> bool:
    """Whether one of them keeps figures and texts."""
    return any(isinstance(logger, SHOWS) for logger in loggers)


@rank_zero_only
def show_figure(loggers: list[Any], name: str, figure: Figure, step: int = 0) -> None:
    """Give a figure to all loggers that keep some.

    Args:
        loggers: A Trainer's.
        name: With slashes, as of a metric.
        figure: Stays open.
        step: Optimiser steps.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [_image(figure)], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(str(logger.run_id), figure, f"{name}/{step}.png")
        elif isinstance(logger, CometLogger):
            logger.experiment.log_figure(name, figure, step=step)
        elif isinstance(logger, CSVLogger) and not isinstance(logger, MetricsCSV):
            figure.savefig(_file(logger, name, f"{step}.png"))


@rank_zero_only
def show_text(loggers: list[Any], name: str, text: str, step: int = 0) -> None:
    """Give a text to all loggers that keep some.

    Args:
        loggers: A Trainer's.
        name: With slashes, as of a metric.
        text: Markdown.
        step: Optimiser steps.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=["step", "text"], data=[[str(step), text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(str(logger.run_id), text, f"{name}/{step}.md")
        elif isinstance(logger, CometLogger):
            logger.experiment.log_text(text, step=step, metadata={"name": name})
        elif isinstance(logger, CSVLogger) and not isinstance(logger, MetricsCSV):
            _file(logger, name, f"{step}.md").write_text(text)


@rank_zero_only
def note_settings_of_run(loggers: list[Any], settings: Mapping[str, Any]) -> None:
    """Tell the settings of a run to all loggers but TensorBoard's, which has a tab of its own for them.

    MLflow takes each once: a run that goes on keeps those it began with.
    """
    for logger in loggers:
        known: Any = ()
        if isinstance(logger, MLFlowLogger):
            known = logger.experiment.get_run(str(logger.run_id)).data.params
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams({name: value for name, value in settings.items() if name not in known})


def _image(figure: Figure) -> Any:
    """As Weights & Biases takes it: of a figure it would make an interactive one, with other colours and sizes."""
    from PIL import Image

    written = BytesIO()
    figure.savefig(written, format="png")
    return Image.open(written)


def _file(logger: CSVLogger, name: str, file: str) -> Path:
    folder = Path(logger.log_dir) / "figures" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / file


# ---- where a run lies ---------------------------------------------------------------------------------------


@rank_zero_only
def claim_folders(loggers: list[Any]) -> None:
    """Make the run folders of TensorBoard's loggers, each of them no other run's; other processes are told them.

    Other loggers begin their run: they know its place when they know its name.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            claim_version(logger)
        elif type(logger) is CSVLogger:
            keep_rows(logger)
        elif not isinstance(logger, CSVLogger):
            _ = logger.experiment


def folder_of(logger: Any, otherwise: str) -> Path | None:
    """Where a run of a logger lies: where Lightning puts its checkpoints.

    Args:
        logger: Any.
        otherwise: Folder of runs of loggers that have none.

    Returns:
        None while the logger has not begun its run.
    """
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version
    if version is None:
        return None
    named = version if isinstance(version, str) else f"version_{version}"
    return Path(logger.save_dir or otherwise) / str(logger.name) / named


class MetricsCSV(CSVLogger):
    """Lightning's CSVLogger in the folder of another logger, with the rows of a resumed run kept.

    Args:
        beside: The logger whose folder it shares.
        otherwise: Folder of runs, if that one has none.
    """

    def __init__(self, beside: Any, otherwise: str) -> None:
        super().__init__(otherwise, name="", version="")  # its folder is asked for late: see claim_version
        self._beside = beside

    @property
    def log_dir(self) -> str:
        """The folder of the run."""
        return str(folder_of(self._beside, self.root_dir))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = KeptRowsWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the folder holds ``config.yaml``."""
