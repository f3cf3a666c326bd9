"""What is written into a run folder, and which settings loggers are told."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_memlong.cli.parser import not_written, plain, typed_option
from lightning_memlong.cli.run_folders import cannot_write, names_of_runs, run_folder
from lightning_memlong.config import flat
from lightning_memlong.shipped import INSTALLED
from lightning_memlong.training.loggers import note_settings_of_run, tensorboard_loggers

PACKAGES = ("lightning-memlong", "torch", "lightning", "transformers", "faiss-cpu", "faiss-gpu", "peft",
            "sentence-transformers", "jsonargparse", "omegaconf", "torchmetrics", "tensorboard", "numpy")  # fmt: skip

OUTCOMES = ("val/perplexity", "val/perplexity_memory_off", "val/perplexity_ratio", "train/loss",
            "cost/tokens_per_second")  # fmt: skip
"""Columns of TensorBoard's HParams tab beside the settings."""


def git_commit() -> str:
    """Commit of the code, marked if it was changed since; 'unknown' outside a checkout."""
    if INSTALLED:  # maybe in a folder of somebody else's repository; its version says which code it is
        return "unknown"
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class RunRecord(SaveConfigCallback):
    """Writes what made a run into its folder; nothing that is already there is overwritten.

    ``fit`` writes ``config.yaml`` (resolved), ``run.json`` (command, commit, seed, versions, what a checkpoint
    changed) and the raw configuration files into ``config_files/``; ``validate`` and ``test`` write
    ``config_test.yaml`` and so on; a second run in the same folder gets ``_2``.

    Args:
        parser: Set by LightningCLI.
        config: Set by LightningCLI.
        subcommand: What is run.
        notes: Further facts for ``run.json``; may be added to until the files are written.
        config_files: Files given as ``--config``.
        **options: Of Lightning's callback.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        subcommand: str = "fit",
        notes: Mapping[str, Any] = MappingProxyType({}),
        config_files: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(parser, config, **options)
        self.subcommand, self.notes, self.config_files = subcommand, notes, config_files

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the files once the run folder is known."""
        if (folder := run_folder(trainer)) is None:
            return
        suffix = self._free_suffix(folder, suffix_of(self.subcommand))
        try:
            raw = folder / f"config_files{suffix}"
            raw.mkdir(parents=True, exist_ok=True)  # a run that was killed just here has left it
            text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
            left_out = "".join(f"# not written: {option}, {what}\n" for option, what in not_written.items())
            (folder / f"config{suffix}.yaml").write_text(left_out + text)
            for number, file in enumerate(self.config_files):
                shutil.copy(file, raw / f"{number}-{Path(file).name}")
            record = {"command": sys.argv, "git_commit": git_commit(), "seed": self.config.get("seed_everything")}
            record |= {"subcommand": self.subcommand, "versions": versions(), "loggers": names_of_runs(trainer)}
            record |= self.notes
            (folder / f"run{suffix}.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        except OSError as error:
            raise cannot_write(folder, error) from error
        if self.subcommand == "fit":
            settings = hyperparameters(flat(plain(self.parser, self.config)))
            note_hyperparameters(trainer.loggers, settings)
            note_settings_of_run(trainer.loggers, settings)

    @staticmethod
    def _free_suffix(folder: Path, stage: str) -> str:
        number = 1
        while (folder / f"config{(suffix := stage + (f'_{number}' if number > 1 else ''))}.yaml").exists():
            number += 1
        return suffix


def suffix_of(subcommand: str) -> str:
    """What a subcommand's files in a run folder end in, before their ending; nothing for ``fit``."""
    return "" if subcommand == "fit" else f"_{subcommand}"


def note_hyperparameters(loggers: list[Any], settings: dict[str, Any]) -> None:
    """Fill TensorBoard's HParams tab: every setting that says what is learned, and what became of it.

    Args:
        loggers: A Trainer's.
        settings: As :func:`hyperparameters` gives them.
    """
    for logger in tensorboard_loggers(loggers):
        logger.hparams.update(settings)
        columns, *session = hparams(settings, dict.fromkeys(OUTCOMES, 0.0))
        # TensorBoard takes the columns from any one run that says them; for a sweep, its report says them.
        in_sweep = (Path(logger.log_dir) / "sweep.json").exists()
        for summary in session if in_sweep else [columns, *session]:
            add_summary(logger.experiment, summary)


def add_summary(writer: SummaryWriter, summary: Any) -> None:
    """Write what SummaryWriter has no method for: its own ``add_hparams`` makes a run of its own, with curves of zeros.

    Args:
        writer: Open.
        summary: One of :func:`torch.utils.tensorboard.summary.hparams`.
    """
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary)


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """Settings as the HParams tab has them, of a configuration with dotted keys; those that are null are left out."""
    groups = ("seed_everything", "model.", "memory.", "data.", "trainer.max_steps", "trainer.precision")
    return {
        typed_option(key): value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in config.items()
        if key.startswith(groups) and value is not None and value != {}
    }


def note_settings(trainer: Any, module: L.LightningModule) -> None:
    """Write what makes the run, for what Lightning has no loop of its own for and so does not set up."""
    for callback in trainer.callbacks:
        if isinstance(callback, RunRecord):
            callback.save_config(trainer, module, callback.subcommand)
