"""Run folders: where they are, which checkpoint is the last, and how a run goes on in one."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
from jsonargparse import Namespace

from lightning_memlong.errors import UserError
from lightning_memlong.training.loggers import claim_folders, folder_of, tensorboard_loggers

NAMED_BY = {"WandbLogger": "version", "MLFlowLogger": "run_id", "CometLogger": "experiment_key"}
"""Of loggers whose runs have names of their own, the option that goes on with one."""


def begin_run(trainer: L.Trainer) -> Path | None:
    """Make a run folder that is no other run's; None where nothing is logged.

    Raises:
        UserError: If it cannot be written.
    """
    if trainer.loggers:
        claim_folders(trainer.loggers)
    return run_folder(trainer)


def run_folder(trainer: L.Trainer) -> Path | None:
    """What ``trainer.log_dir`` gives, without asking the other processes, which may not be listening."""
    if not trainer.loggers:
        return None
    return folder_of(trainer.loggers[0], trainer.default_root_dir)


def tensorboard_folder(trainer: L.Trainer) -> Path | None:
    """What TensorBoard is to be opened on; None: it was given nothing."""
    found = tensorboard_loggers(trainer.loggers)
    return Path(found[0].log_dir).parent if found else None


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
        raise cannot_write(folder, error, key) from error


def cannot_write(folder: Path, error: OSError, key: str = "trainer.logger.save_dir") -> UserError:
    """What to say of a folder in which nothing can be written."""
    return UserError(
        f"{key}: cannot write the folder {folder} ({error.strerror or error}). Allowed: a writable folder with free "
        f"space. Fix: free some, or choose another with --{key}."
    )


def last_checkpoint(root: Path) -> Path:
    """The newest ``last.ckpt`` of all runs under a folder.

    Raises:
        UserError: If there is none.
    """
    # Without a logger, in a run folder, and in that of a logger whose runs lie in a project.
    places = ("checkpoints", "*/checkpoints", "*/*/checkpoints")
    files = [file for place in places for file in root.glob(f"{place}/last*.ckpt")]
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


def _kind(entry: Namespace) -> str:
    return str(entry.class_path).rpartition(".")[2]


def runs_root(config: Namespace) -> Path:
    """Folder in which this configuration's run folders lie."""
    default = Path(config.trainer.default_root_dir or ".")
    for entry in _loggers(config):
        args = entry.init_args
        root = args.get("save_dir") or args.get("offline_directory")
        if not str(args.get("tracking_uri") or "file:").startswith("file:"):
            root = None  # an MLflow server or database
        return Path(root or default) if _kind(entry) in NAMED_BY else Path(root or ".") / (args.get("name") or "")
    return default if config.trainer.logger is False else default / "lightning_logs"


def names_of_runs(trainer: L.Trainer) -> dict[str, str]:
    """Of each logger whose runs have names of their own, that of this one."""
    return {kind: str(logger.version) for logger in trainer.loggers if (kind := type(logger).__name__) in NAMED_BY}


def noted_names(folder: Path) -> dict[str, str]:
    """The same of a run that has been, from what is in its folder."""
    file = folder / "run.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return dict(found.get("loggers") or {})


def continue_in(config: Namespace, version: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Let a run write on where it did before, unless another version was asked for.

    Args:
        config: Of its subcommand. Changed in place.
        version: Name of the run folder.
        names: Of runs of loggers that have names of their own, by kind.
    """
    entries = _loggers(config)
    for entry in entries:
        option = NAMED_BY.get(_kind(entry), "version")
        name: Any = names.get(_kind(entry)) if _kind(entry) in NAMED_BY else version
        if name is None and option == "version" and len(entries) == 1:
            name = version
        if name is not None and entry.init_args.get(option) is None:
            entry.init_args[option] = name
