"""The command line: LightningCLI with OmegaConf, one memory group, honest checkpoints and friendly errors."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from callbacks.memory_bank import MemoryBankCallback
from datamodules.documents import DocumentDataModule
from lightning_memlong.attention import require_gradients
from lightning_memlong.cli.checkpoints import note_differences
from lightning_memlong.cli.console import ParameterSummary, show_parameters, show_perplexity
from lightning_memlong.cli.evaluate import PART_HELP, check_part, evaluate
from lightning_memlong.cli.fingerprint import evaluation_identity
from lightning_memlong.cli.messages import exit_status, quiet_libraries
from lightning_memlong.cli.parser import (
    DEBUG,
    Parser,
    config_files,
    not_written,
    open_data,
    parse_over,
    plain,
    tell_hidden_files,
    with_files_found,
)
from lightning_memlong.cli.push import check_push
from lightning_memlong.cli.results import HEADINGS, first_validation, stage_metrics, write_results
from lightning_memlong.cli.run_folders import (
    begin_run,
    check_writable,
    continue_in,
    last_checkpoint,
    noted_names,
    run_folder,
    runs_root,
    tensorboard_folder,
)
from lightning_memlong.cli.run_record import RunRecord
from lightning_memlong.cli.switches import leave_out_forbidden
from lightning_memlong.cli.trainer import Trainer
from lightning_memlong.config import MemoryConfig, require
from lightning_memlong.distributed import say
from lightning_memlong.evaluation import Evaluation
from lightning_memlong.model import exported_settings, read_checkpoint, run_of, stored_settings
from lightning_memlong.training import MemLongModule, require_memory
from lightning_memlong.training.checkpoint_io import write_whole_checkpoints
from lightning_memlong.training.lightning_private import CheckpointAwareCLI, hide_later_events
from lightning_memlong.training.loggers import MetricsCSV, tensorboard_loggers


class MemLongCLI(CheckpointAwareCLI):
    """``model``, ``memory``, ``data`` and ``trainer``, each addressable from the command line.

    Values are taken, later over earlier, from: the first ``--config``, the checkpoint's own ``model`` settings
    (optimiser and schedule aside), further ``--config`` files and options as typed.
    """

    NAMES: tuple[str, ...] = ("fit", "validate", "test", "predict", "chat", "export", "layers")
    TALKS: tuple[str, ...] = ("predict", "chat")
    """Subcommands that read documents whole, and know late whether there will be a run."""
    TRAINER = Trainer

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        # Overrides must reach ${...} interpolations, and field docstrings must reach --help.
        set_parsing_settings(
            omegaconf_absolute_to_relative_paths=True,
            docstring_parse_attribute_docstrings=True,
        )
        # Lightning's callbacks have such options, whose defaults must go through a file and back.
        register_type(torch.device, fail_already_registered=False)
        not_written.clear()
        self.argv = with_files_found(list(sys.argv[1:] if args is None else args))
        tell_hidden_files(config_files(self.argv))
        self.asked = next((a for a in self.argv if a in self.NAMES), "fit")
        self._resumed_at = 0  # steps that were made before
        self.notes: dict[str, Any] = {}
        """Further facts for ``run.json``."""
        record = {"subcommand": self.asked, "notes": self.notes, "config_files": config_files(self.argv)}
        super().__init__(
            MemLongModule,
            DocumentDataModule,
            subclass_mode_data=True,
            trainer_class=self.TRAINER,
            parser_class=Parser,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False, **record},
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=self.argv,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the memory group, and tie together values that must always agree."""
        parser.add_class_arguments(MemoryConfig, "memory")
        parser.add_argument(
            "--validate_first",
            type=bool,
            default=True,
            help="Validate before the first training step of fit, so that curves begin with the untrained model.",
        )
        if self.asked == "test":
            parser.add_argument(
                "--evaluation",
                type=Evaluation | None,
                default=None,
                help="An evaluation to run instead of the perplexity of the test text: see conf/eval/.",
            )
            parser.add_argument("--part", type=str | None, default=None, help=PART_HELP)
        parser.link_arguments("model.backbone", "data.init_args.tokenizer")
        parser.link_arguments("memory.chunk_size", "data.init_args.chunk_size")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def merge_stored_settings(self) -> None:
        """Put a checkpoint's or an exported folder's model settings under what was typed, and say where they differ.

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
        checkpoint = read_checkpoint(path, str(given))
        self._resumed_at = int(checkpoint["global_step"]) if name == "fit" else 0
        self._put_under(stored_settings(checkpoint), name, "checkpoint")
        self.config[name].ckpt_path = str(path)
        if given == "last" and name == "fit":
            folder = run_of(path) or path.parents[1]
            continue_in(self.config[name], folder.name, noted_names(folder))
        self.notes["ckpt_path"] = str(path)

    def _put_under(self, stored: dict[str, Any], name: str, whose: str) -> None:
        """Let stored model settings win over the first ``--config`` and yield to everything else."""
        before = plain(self.parser, self.config)[name]["model"]
        self.config = parse_over(self.parser, self.argv, {"model": stored})
        after = plain(self.parser, self.config)[name]["model"]
        self.notes[f"{whose}_settings_that_differ"] = note_differences(stored, before, after, whose)

    def before_instantiate_classes(self) -> None:
        """Give an evaluation a run folder named after its settings, so that the same command goes on with it."""
        if self.subcommand == "export":  # before a model is loaded
            check_push(self.config["export"].push_to_hub, self.config["export"].private)
        if self.subcommand == "test":
            # It is no setting: the run folder is that of all parts.
            self._part, self.config["test"].part = self.config["test"].part, None
            check_part(self._part, self._evaluates())
        if self._evaluates():
            name = str(self.subcommand)
            config = self.config[name]
            self._identity = evaluation_identity(plain(self.parser, self.config)[name], config.ckpt_path)
            kind = config.evaluation.class_path.rpartition(".")[2]
            continue_in(config, f"{kind}-{self._identity}")

    def _evaluates(self) -> bool:
        return self.subcommand == "test" and self.config[self.subcommand].get("evaluation") is not None

    # ---- building and running -----------------------------------------------------------------------------

    def _built(self, group: str) -> Any:
        """What was built of a group or an option."""
        return (self.config_init[self.subcommand] if self.subcommand else self.config_init)[group]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the memory callback, unless memory is switched off."""
        config: MemoryConfig = self._built("memory")
        callbacks = kwargs.pop("callbacks", None) or []
        leave_out_forbidden(self._built("trainer"))
        chosen = list(self._built("trainer")["callbacks"])  # Lightning adds its own to the list
        if config.enabled:
            callbacks = [*callbacks, MemoryBankCallback(config)]
        trainer: Any = super().instantiate_trainer(**kwargs)
        write_whole_checkpoints(trainer)
        # First in line, so that observers find the retrieved record in the batch.
        trainer.callbacks[:0] = callbacks
        trainer.callbacks[:] = [
            ParameterSummary() if isinstance(c, ModelSummary) and c not in chosen else c for c in trainer.callbacks
        ]
        if trainer.loggers and not isinstance(trainer.loggers[0], CSVLogger):
            trainer.loggers += [MetricsCSV(trainer.loggers[0], trainer.default_root_dir)]
        return trainer

    def after_instantiate_classes(self) -> None:
        """Read the data and load the retriever first: nothing is written for a run that cannot start."""
        if self.subcommand in (None, "export"):
            return
        if self.subcommand in self.TALKS:
            self._check_capacity()
        else:
            self._open_data(str(self.subcommand))
        if self.trainer.loggers:
            check_writable(runs_root(self.config[self.subcommand]))
        if self._resumed_at:
            for logger in tensorboard_loggers(self.trainer.loggers):
                hide_later_events(logger, self._resumed_at)
        if self.subcommand not in self.TALKS:
            begin_run(self.trainer)

    def _open_data(self, subcommand: str) -> None:
        if subcommand == "fit":
            require_gradients(self.model.model.layout.attention, self.trainer.strategy.root_device)
            require_memory(self._built("memory").enabled or self.model.loss_weights == "none")
        stage = "validate" if subcommand == "layers" else subcommand
        if not self._evaluates() or self._built("evaluation").reads_data:
            self.datamodule.setup(stage)
        if callback := self.trainer.memory_callback():  # type: ignore[attr-defined]
            callback.check(self.datamodule, self.model, stage)
            callback.load_retriever(self.model)

    def _check_capacity(self) -> None:
        typed = any(a.partition("=")[0] == "--memory.capacity" for a in self.argv)
        value = self._built("memory").capacity
        allowed = "that of the configuration, which banks are trained with; here documents are kept whole"
        require(not typed, "memory.capacity", value, allowed, "give --capacity, the size of the bank that is read into")

    def before_fit(self) -> None:
        """Validate the untrained model, so that every curve has its beginning."""
        self._first: dict[str, float] = {}
        config = self.config[self.subcommand]
        if folder := run_folder(self.trainer):
            say(f"Run folder: {folder}", flush=True)
            self._first = first_validation(folder) if self._resumed_at else {}
        show_parameters(self.model.model)
        if config.validate_first and not config.ckpt_path and self.trainer.limit_val_batches:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self._first = stage_metrics(self.trainer, "val")

    def after_fit(self) -> None:
        """Print perplexity with memory on and off, and where everything is."""
        if self.trainer.limit_val_batches and self.model.validated_at != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        results = {"before": self._first, "after": stage_metrics(self.trainer, "val")}
        self._report("Validation perplexity (same weights, same tokens in each row)", results)

    def after_validate(self) -> None:
        """Print perplexity with memory on and off."""
        self._report(
            "Validation perplexity (same weights, same tokens)", {"metrics": stage_metrics(self.trainer, "val")}
        )

    def test(self, **options: Any) -> None:
        """Run an evaluation, or else the Trainer's own test; LightningCLI looks here first."""
        if not self._evaluates():
            self.trainer.test(**options)
            return
        config = plain(self.parser, self.config)["test"]

        def corpus(name: str, given: Any) -> DocumentDataModule:
            return open_data(name, given, config)

        path, chosen = self.config["test"].ckpt_path, self._built("evaluation")
        evaluate(self.trainer, self.model, self.datamodule, chosen, corpus, path, self._identity, self._part)

    def after_test(self) -> None:
        """Print perplexity with memory on and off; an evaluation has printed its tables."""
        if not self._evaluates():
            self._report(
                "Test perplexity (same weights, same tokens)", {"metrics": stage_metrics(self.trainer, "test")}
            )

    def _report(self, title: str, results: dict[str, dict[str, float]]) -> None:
        write_results(self.trainer, str(self.subcommand), results)
        memory = self._built("memory")
        on = "memory on" + (" (LEAKING query: current)" if memory.query == "current" else "")
        rows = {HEADINGS[key]: metrics for key, metrics in results.items()}
        show_perplexity(
            title, rows, on if memory.enabled else None, run_folder(self.trainer), tensorboard_folder(self.trainer)
        )


def main(args: list[str] | None = None, cli: type[MemLongCLI] = MemLongCLI) -> int:
    """Run the command line.

    Args:
        args: What was typed; None: what this process was started with.
        cli: Which: one with more subcommands, maybe.

    Returns:
        0, or 2 after a mistake that a person can fix, told without a traceback.
    """
    given = list(sys.argv[1:] if args is None else args)
    words = [word for word in given if word != DEBUG]
    with quiet_libraries():
        return exit_status(lambda: cli(words), debug=words != given)
