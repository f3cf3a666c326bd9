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
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.logging import RichHandler

from callbacks.memory_bank import MemoryBankCallback
from datamodules.documents import DocumentDataModule
from lightning_memlong.attention import require_gradients
from lightning_memlong.cli.checkpoints import note_differences
from lightning_memlong.cli.console import show_parameters, show_perplexity
from lightning_memlong.cli.evaluate import measure
from lightning_memlong.cli.fingerprint import evaluation_identity
from lightning_memlong.cli.parser import Parser, config_files, insert_config, open_data, plain
from lightning_memlong.cli.runs import (
    RunRecord,
    check_writable,
    continue_in,
    last_checkpoint,
    run_folder,
    runs_root,
    write_results,
)
from lightning_memlong.cli.trainer import Trainer
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.distributed import say
from lightning_memlong.errors import UserError
from lightning_memlong.evaluation import Evaluation
from lightning_memlong.model import exported_settings, read_checkpoint, stored_settings
from lightning_memlong.training.loggers import MetricsCSV
from lightning_memlong.training.module import MemLongModule

log = logging.getLogger("lightning_memlong")

SUBCOMMANDS = ("fit", "validate", "test", "predict", "chat", "export", "layers")


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
        RunRecord.subcommand = next((a for a in self._argv if a in SUBCOMMANDS), "fit")
        RunRecord.notes, RunRecord.config_files = {}, config_files(self._argv)
        super().__init__(
            MemLongModule,
            DocumentDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            parser_class=Parser,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommands and the arguments they do not expose; only the one asked for, as each costs start-up time."""
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        asked = [argument for argument in self._argv if argument in SUBCOMMANDS][:1]
        return {name: hidden for name in asked or SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the memory group, and tie together values that must always agree."""
        parser.add_class_arguments(MemoryConfig, "memory")
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=True,
            help="Validate before the first training step of fit, so that curves begin with the untrained model.",
        )
        if RunRecord.subcommand == "test":
            parser.add_argument(
                "--evaluation",
                type=Evaluation | None,
                default=None,
                help="An evaluation to run instead of the perplexity of the test text: see conf/eval/.",
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
        if not name:
            return
        given = self.config[name].get("ckpt_path")
        if not given:
            if stored := exported_settings(self.config[name].model.backbone):
                self._put_under(stored, name, "export")
            return
        path = last_checkpoint(runs_root(self.config[name])) if given == "last" else Path(given)
        self._put_under(stored_settings(read_checkpoint(path, str(given))), name, "checkpoint")
        self.config[name].ckpt_path = str(path)
        if given == "last" and name == "fit":
            continue_in(self.config[name], path.parents[1].name)
        RunRecord.notes["ckpt_path"] = str(path)

    def _put_under(self, stored: dict[str, Any], name: str, whose: str) -> None:
        """Let stored model settings win over the first ``--config`` and yield to everything else."""
        before = plain(self.parser, self.config)[name]["model"]
        self.config = self._parse_over(stored)
        after = plain(self.parser, self.config)[name]["model"]
        RunRecord.notes[f"{whose}_settings_that_differ"] = note_differences(stored, before, after, whose)

    def _parse_over(self, stored: dict[str, Any]) -> Namespace:
        """Parse again with the checkpoint's settings as a configuration file just after the first one."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({"model": stored}, file)
            file.flush()
            return self.parser.parse_args(insert_config(self._argv, file.name))

    def before_instantiate_classes(self) -> None:
        """Give an evaluation a run folder named after its settings, so that the same command goes on with it."""
        if self._evaluates():
            name = str(self.subcommand)
            config = self.config[name]
            self._identity = evaluation_identity(plain(self.parser, self.config)[name], config.ckpt_path)
            kind = config.evaluation.class_path.rpartition(".")[2]
            continue_in(config, f"{kind}-{self._identity}")

    def _evaluates(self) -> bool:
        return self.subcommand == "test" and self.config[self.subcommand].get("evaluation") is not None

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
        trainer.loggers += [MetricsCSV(logger) for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return trainer

    def after_instantiate_classes(self) -> None:
        """Read the data and load the retriever first: nothing is written for a run that cannot start."""
        if self.subcommand in (None, "export"):
            return
        if self.subcommand in ("predict", "chat"):
            self._check_answering()
        else:
            self._open_data(str(self.subcommand))
        if self.trainer.loggers:
            check_writable(runs_root(self.config[self.subcommand]))

    def _open_data(self, subcommand: str) -> None:
        if subcommand == "fit":
            require_gradients(self.model.model.layout.attention, self.trainer.strategy.root_device)
        stage = "validate" if subcommand == "layers" else subcommand
        if not self._evaluates() or self._get(self.config_init, "evaluation").reads_data:
            self.datamodule.setup(stage)
        if callback := self.trainer.memory_callback():  # type: ignore[attr-defined]
            callback.check(self.datamodule, self.model, stage)
            callback.load_retriever(self.model)

    def _check_answering(self) -> None:
        typed = any(a.partition("=")[0] == "--memory.capacity" for a in self._argv)
        value = self._get(self.config_init, "memory").capacity
        allowed = "that of the configuration, which banks are trained with; here documents are kept whole"
        require(not typed, "memory.capacity", value, allowed, "give --capacity, the size of the bank that is read into")

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._evaluates():
            super()._run_subcommand(subcommand)
            return
        config = self.config[subcommand]

        def corpus(name: str, options: Any) -> DocumentDataModule:
            return open_data(name, options, plain(self.parser, self.config)[subcommand])

        evaluation = self._get(self.config_init, "evaluation")
        measure(self.trainer, self.model, self.datamodule, evaluation, corpus, config.ckpt_path, self._identity)

    def before_fit(self) -> None:
        """Validate the untrained model, so that every curve has its beginning."""
        self._first: dict[str, float] = {}
        config = self.config[self.subcommand]
        if folder := run_folder(self.trainer):
            say(f"Run folder: {folder}", flush=True)
        show_parameters(self.model.model)
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

    def _report(self, title: str, rows: dict[str, dict[str, float]]) -> None:
        write_results(self.trainer, str(self.subcommand), rows)
        memory = self._get(self.config_init, "memory")
        on = "memory on" + (" (LEAKING query: current)" if memory.query == "current" else "")
        show_perplexity(title, rows, on if memory.enabled else None, run_folder(self.trainer))


def _metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    return {k.removeprefix(f"{stage}/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(stage)}


@contextmanager
def calm() -> Iterator[None]:
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


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an error, if there is one: the parser wraps what constructors raise."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 after a mistake that a person can fix, told without a traceback.
    """
    with calm():
        try:
            MemLongCLI(args)
        except ValueError as error:
            told = user_error(error)
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
