"""The command line: LightningCLI with OmegaConf, one memory group, honest checkpoints and friendly errors."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from callbacks.memory_bank import MemoryBankCallback
from datamodules.documents import DocumentDataModule
from lightning_memlong.config import MemoryConfig
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError
from lightning_memlong.module import CHECKPOINT_FORMAT, MemLongModule
from lightning_memlong.parsing import Parser, config_files, flat, insert_config, plain
from lightning_memlong.runs import RunRecord, check_writable, continue_in, last_checkpoint, run_folder, runs_root

log = logging.getLogger("lightning_memlong")


class MemLongCLI(LightningCLI):
    """``model``, ``memory``, ``data`` and ``trainer``, each addressable from the command line.

    Values are taken, later over earlier, from: the first ``--config``, the checkpoint's own ``model`` settings
    (optimiser and schedule aside), further ``--config`` files and options as typed.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        # Overrides must reach ${...} interpolations, and field docstrings must reach --help.
        set_parsing_settings(
            omegaconf_absolute_to_relative_paths=True,
            docstring_parse_attribute_docstrings=True,
        )
        self._argv = list(sys.argv[1:] if args is None else args)
        RunRecord.subcommand = next((a for a in self._argv if a in self.subcommands()), "fit")
        RunRecord.notes, RunRecord.config_files = {}, config_files(self._argv)
        super().__init__(
            MemLongModule,
            DocumentDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands that exist so far, and the arguments they do not expose."""
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {name: hidden for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the memory group, and tie together values that must always agree."""
        parser.add_class_arguments(MemoryConfig, "memory")
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=True,
            help="Validate before the first training step of fit, so that curves begin with the untrained model.",
        )
        parser.link_arguments("model.backbone", "data.init_args.tokenizer")
        parser.link_arguments("memory.chunk_size", "data.init_args.chunk_size")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _parse_ckpt_path(self) -> None:
        """Put the checkpoint's model settings under what was typed, and say where they differ.

        Lightning lets a checkpoint silently override the command line; here the typed value wins.
        """
        name = self.config.get("subcommand")
        if not name or not (given := self.config[name].get("ckpt_path")):
            return
        path = last_checkpoint(runs_root(self.config[name])) if given == "last" else Path(given)
        if not path.is_file():
            raise UserError(
                f"ckpt_path={str(given)!r} is not a file. Allowed: last, or the path of a .ckpt file. Fix: correct it."
            )
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:
            raise UserError(
                f"ckpt_path={str(given)!r} cannot be read as a checkpoint ({type(error).__name__}). Allowed: a whole "
                ".ckpt file written by fit. Fix: give another, it may have been cut short."
            ) from error
        if "memlong" not in checkpoint:
            raise UserError(
                f"ckpt_path={str(given)!r} is not a MemLong checkpoint. Allowed: one written by train.py fit. "
                "Fix: give another."
            )
        if (found := checkpoint["memlong"].get("format", 1)) != CHECKPOINT_FORMAT:
            raise UserError(
                f"ckpt_path={str(given)!r} is of format {found}. Allowed: {CHECKPOINT_FORMAT}. Fix: use the release "
                "that wrote it, or train again."
            )
        # What the network is; the recipe (optimiser, schedule) is this run's and is not in there.
        stored = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
        before = plain(self.parser, self.config)[name]["model"]
        self.config = self._parse_over(stored)
        after = plain(self.parser, self.config)[name]["model"]
        self.config[name].ckpt_path = str(path)
        self._note_differences(stored, before, after)
        if given == "last" and name == "fit":
            continue_in(self.config[name], path.parents[1].name)
        RunRecord.notes["ckpt_path"] = str(path)

    def _parse_over(self, stored: dict[str, Any]) -> Namespace:
        """Parse again with the checkpoint's settings as a configuration file just after the first one."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({"model": stored}, file)
            file.flush()
            return self.parser.parse_args(insert_config(self._argv, file.name))

    def _note_differences(self, stored: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        notes = {}
        for key, kept in flat(stored).items():
            asked, used = flat(before).get(key), flat(after).get(key)
            if kept == asked == used:
                continue
            notes[f"model.{key}"] = {"checkpoint": kept, "config": asked, "used": used}
            whose = "the checkpoint's is used" if used == kept else "what you typed is used"
            log.info("model.%s: checkpoint %r, this run's configuration %r; %s", key, kept, asked, whose)
        RunRecord.notes["checkpoint_settings_that_differ"] = notes

    # ---- building and running -----------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the memory callback, unless memory is switched off."""
        config: MemoryConfig = self._get(self.config_init, "memory")
        callbacks = kwargs.pop("callbacks", None) or []
        if config.enabled:
            callbacks = [*callbacks, MemoryBankCallback(config)]
        trainer = super().instantiate_trainer(**kwargs)
        # First in line, so that observers find the retrieved record in the batch.
        trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
        return trainer

    def after_instantiate_classes(self) -> None:
        """Read the data and load the retriever first: nothing is written for a run that cannot start."""
        if self.subcommand is None:
            return
        self.datamodule.setup(self.subcommand)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MemoryBankCallback):
                callback.check(self.datamodule, self.model, self.subcommand)
                callback.load_retriever()
        if self.trainer.loggers:
            check_writable(runs_root(self.config[self.subcommand]))

    def before_fit(self) -> None:
        """Validate the untrained model, so that every curve has its beginning."""
        self._first: dict[str, float] = {}
        config = self.config[self.subcommand]
        if folder := run_folder(self.trainer):
            say(f"Run folder: {folder}", flush=True)
        if config.validate_first and not config.ckpt_path and self.trainer.limit_val_batches:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self._first = _metrics(self.trainer, "val")

    def after_fit(self) -> None:
        """Print perplexity with memory on and off, and where everything is."""
        if self.trainer.limit_val_batches and self.model.validated_at != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        rows = {"before training": self._first, "after training": _metrics(self.trainer, "val")}
        self._report("Validation perplexity (same weights, same tokens in each row)", rows)

    def after_validate(self) -> None:
        """Print perplexity with memory on and off."""
        self._report("Validation perplexity (same weights, same tokens)", {"": _metrics(self.trainer, "val")})

    def after_test(self) -> None:
        """Print perplexity with memory on and off."""
        self._report("Test perplexity (same weights, same tokens)", {"": _metrics(self.trainer, "test")})

    @rank_zero_only
    def _report(self, title: str, rows: dict[str, dict[str, float]]) -> None:
        memory = self._get(self.config_init, "memory")
        on = "memory on" + (" (LEAKING query: current)" if memory.query == "current" else "")
        table = Table(title=title, title_justify="left")
        for column in ("", on if memory.enabled else "no memory", "memory off", "on / off"):
            table.add_column(column, justify="right")
        for name, metrics in rows.items():
            values = [metrics.get(k) for k in ("perplexity", "perplexity_memory_off", "perplexity_ratio")]
            if values[0] is not None:
                table.add_row(name, *("-" if v is None else f"{v:.3f}" for v in values))
        console = Console(width=max(80, Console().width))
        console.print(table)
        if folder := run_folder(self.trainer):
            console.print(f"Run folder: {folder}", soft_wrap=True)
            console.print(f"Look at it: {_tensorboard()} --logdir {folder.parent}", soft_wrap=True)


def _metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    return {k.removeprefix(f"{stage}/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(stage)}


@contextmanager
def _calm() -> Iterator[None]:
    """Our own log lines, and no advice that does not apply here."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)], force=True)
    log.setLevel(logging.INFO)
    for name in ("faiss.loader", "httpx", "sentence_transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: "Tip:" not in record.getMessage())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*module.s. in eval mode.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
        # It is: the position is part of the DataModule's state.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        # Perplexities are already those of all processes; the bank's numbers are those of the first.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
        yield


def _tensorboard() -> str:
    """How to call TensorBoard from here, whether or not its environment is activated."""
    beside = Path(sys.executable).parent / "tensorboard"
    if not beside.exists():
        return "tensorboard"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an error, if there is one: the parser wraps what constructors raise."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 after a mistake that a person can fix, told without a traceback.
    """
    with _calm():
        try:
            MemLongCLI(args)
        except ValueError as error:
            told = _user_error(error)
            if told is None:
                raise
            sys.stderr.write(f"error: {told}\n")
            return 2
        except OSError as error:
            if error.errno not in (28, 27, 30, 13):  # no space, too large, read-only, not permitted
                raise
            sys.stderr.write(
                f"error: cannot write {error.filename or 'a file'}: {error.strerror}. Allowed: a writable folder with "
                "free space. Fix: free some, or choose another with --trainer.logger.save_dir.\n"
            )
            return 2
    return 0
