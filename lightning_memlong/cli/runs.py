"""Run folders: what is written into them, and which checkpoint is the last."""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_memlong.cli.parser import not_written, plain, typed_option
from lightning_memlong.config import flat
from lightning_memlong.errors import UserError
from lightning_memlong.training.loggers import claim_folders

PACKAGES = ("torch", "lightning", "transformers", "faiss-cpu", "faiss-gpu", "sentence-transformers", "peft",
            "jsonargparse", "omegaconf", "torchmetrics", "tensorboard", "numpy")  # fmt: skip

OUTCOMES = ("val/perplexity", "val/perplexity_memory_off", "val/perplexity_ratio", "train/loss",
            "cost/tokens_per_second")  # fmt: skip
"""Columns of TensorBoard's HParams tab beside the settings."""


def git_commit() -> str:
    """Commit of the code, marked if it was changed since; 'unknown' outside a checkout."""
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
            raw.mkdir(parents=True)
            text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
            left_out = "".join(f"# not written: {option}, {what}\n" for option, what in not_written.items())
            (folder / f"config{suffix}.yaml").write_text(left_out + text)
            for number, file in enumerate(self.config_files):
                shutil.copy(file, raw / f"{number}-{Path(file).name}")
            record = {"command": sys.argv, "git_commit": git_commit(), "seed": self.config.get("seed_everything")}
            record |= {"subcommand": self.subcommand, "versions": versions(), **self.notes}
            (folder / f"run{suffix}.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        except OSError as error:
            raise _cannot_write(folder, error) from error
        if self.subcommand == "fit":
            note_hyperparameters(trainer, plain(self.parser, self.config))

    @staticmethod
    def _free_suffix(folder: Path, stage: str) -> str:
        number = 1
        while (folder / f"config{(suffix := stage + (f'_{number}' if number > 1 else ''))}.yaml").exists():
            number += 1
        return suffix


def suffix_of(subcommand: str) -> str:
    """What a subcommand's files in a run folder end in, before their ending; nothing for ``fit``."""
    return "" if subcommand == "fit" else f"_{subcommand}"


def note_hyperparameters(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Fill TensorBoard's HParams tab: every setting that says what is learned, and what became of it.

    Args:
        trainer: Its loggers are written to.
        config: Of ``fit``, as plain values.
    """
    settings = hyperparameters(flat(config))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
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


def begin_run(trainer: L.Trainer) -> Path | None:
    """Make a run folder that is no other run's; None where nothing is logged.

    Raises:
        UserError: If it cannot be written.
    """
    if trainer.loggers:
        claim_folders(trainer.loggers)
    return run_folder(trainer)


def note_settings(trainer: Any, module: L.LightningModule) -> None:
    """Write what makes the run, for what Lightning has no loop of its own for and so does not set up."""
    for callback in trainer.callbacks:
        if isinstance(callback, RunRecord):
            callback.save_config(trainer, module, callback.subcommand)


def run_folder(trainer: L.Trainer) -> Path | None:
    """What ``trainer.log_dir`` gives, without asking the other processes, which may not be listening."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    folder = logger.log_dir if isinstance(logger, TensorBoardLogger | CSVLogger) else logger.save_dir
    return None if folder is None else Path(folder)


def check_writable(folder: Path, key: str = "trainer.logger.save_dir") -> None:
    """Make a folder, so that a run that could not be written does not start.

    Args:
        folder: The folder.
        key: The setting that says where, for messages.

    Raises:
        UserError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error, key) from error


def _cannot_write(folder: Path, error: OSError, key: str = "trainer.logger.save_dir") -> UserError:
    return UserError(
        f"{key}: cannot write the folder {folder} ({error.strerror or error}). Allowed: a writable folder with free "
        f"space. Fix: free some, or choose another with --{key}."
    )


def last_checkpoint(root: Path) -> Path:
    """The newest ``last.ckpt`` of all runs under a folder.

    Raises:
        UserError: If there is none.
    """
    files = [*root.glob("*/checkpoints/last*.ckpt"), *root.glob("checkpoints/last*.ckpt")]  # these without a logger
    found = sorted(files, key=lambda f: f.stat().st_mtime)
    if not found:
        raise UserError(
            f"ckpt_path='last': no run under {root} has a checkpoint. Allowed: last, once a run has saved one, or the "
            "path of a .ckpt file. Fix: start without --ckpt_path, or give the path."
        )
    return found[-1]


def _loggers(config: Namespace) -> list[Namespace]:
    logger = config.trainer.logger
    found = logger if isinstance(logger, list) else [logger]
    return [entry for entry in found if isinstance(entry, Namespace) and "init_args" in entry]


def runs_root(config: Namespace) -> Path:
    """Folder in which this configuration's run folders lie."""
    for entry in _loggers(config):
        args = entry.init_args
        return Path(args.get("save_dir") or ".") / (args.get("name") or "")
    root = Path(config.trainer.default_root_dir or ".")
    return root if config.trainer.logger is False else root / "lightning_logs"


def continue_in(config: Namespace, version: str) -> None:
    """Let a resumed fit write on in the folder of its run, unless another version was asked for."""
    for entry in _loggers(config):
        if entry.init_args.get("version") is None:
            entry.init_args.version = version
