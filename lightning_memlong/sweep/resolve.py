"""The settings of a run as the command line resolves them, without a run."""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_memlong.cli.main import MemLongCLI
from lightning_memlong.cli.messages import find_user_error
from lightning_memlong.cli.parser import plain, with_files_found
from lightning_memlong.config import MemoryConfig, RetrieverConfig, flat, require
from lightning_memlong.errors import UserError

LONGEST = 600
"""Characters of a message."""


class _ParserMade(Exception):
    """Ends LightningCLI's constructor where only its parser is wanted."""


class ConfigResolver(MemLongCLI):
    """The command line up to its configuration: its parser, which is slow to make, for many arguments; builds nothing.

    Args:
        subcommand: Whose arguments.
    """

    def __init__(self, subcommand: str) -> None:
        with suppress(_ParserMade):
            super().__init__([subcommand])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Stop here: there are no arguments yet."""
        raise _ParserMade

    def resolve(self, arguments: list[str]) -> dict[str, Any]:
        """The configuration that arguments give, their subcommand first, as plain values."""
        self.argv = with_files_found(arguments)
        self.config = self.parser.parse_args(self.argv)
        self.merge_stored_settings()
        return plain(self.parser, self.config)[arguments[0]]

    def settings_of_runs(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """Every setting of a trial's runs with dotted keys; where they are written and the seed aside.

        Args:
            name: Of the trial, for messages.
            arguments: Of ``train.py``.

        Raises:
            UserError: If the trial cannot be run.
        """
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                config = self.resolve(arguments)
            memory = dict(config["memory"])
            MemoryConfig(**memory | {"retriever": RetrieverConfig(**memory["retriever"])})
        except (SystemExit, ValueError) as error:
            why = str(find_user_error(error) or told.getvalue().removeprefix("error:").strip() or error)
            short = why if len(why) <= LONGEST else f"{why[:LONGEST]}..."  # of a mapping, the parser tells all it knows
            raise UserError(f"{name}: {short}") from error
        windows = config["trainer"]["limit_val_batches"]
        allowed = "1 or more windows: runs are compared by the perplexity of the validation text"
        require(windows != 0, "trainer.limit_val_batches", windows, allowed, "raise it")
        for key in ("seed_everything", "ckpt_path"):
            config.pop(key, None)
        _require_one_folder(config["trainer"].pop("logger", None))
        return flat(config)


def _require_one_folder(logger: Any) -> None:
    """A sweep says where each run lies, which only loggers of one folder a run can be told."""
    kind = logger["class_path"].rpartition(".")[2] if isinstance(logger, Mapping) else logger
    allowed = "TensorBoardLogger: its folders are where the sweep looks for results"
    fix = "leave trainer.logger out of its files; a single run takes any logger"
    require(kind == "TensorBoardLogger", "trainer.logger", kind, allowed, fix)


def tokens_a_step(settings: Mapping[str, Any]) -> int:
    """New tokens an optimiser step is trained on.

    Raises:
        UserError: If nobody says on how many devices.
    """
    advance = settings["data.init_args.stride"] or settings["data.init_args.window"]
    windows = settings["data.init_args.batch_size"] * settings["trainer.accumulate_grad_batches"]
    return advance * windows * _devices(settings["trainer.devices"]) * int(settings["trainer.num_nodes"] or 1)


def _devices(given: Any) -> int:
    """How many a setting of Lightning's means: a number, as text too, or a list of them, which may be text as well."""
    named = given if isinstance(given, list) else [part for part in str(given).split(",") if part.strip()]
    if isinstance(given, list) or "," in str(given):
        return len(named)
    ok, allowed = str(given).isdigit() and int(given) > 0, "a number of devices, beside tokens: it says how many steps"
    require(ok, "trainer.devices", given, allowed, "give a number, or trainer.max_steps instead of tokens")
    return int(given)
