"""``memlong look``: its subcommand, beside those of the command line, whose options it shares."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli import MemLongCLI
from lightning_memlong.cli.chat import with_defaults
from lightning_memlong.cli.main import main as run
from lightning_memlong.cli.messages import exit_status
from lightning_memlong.cli.parser import config_files
from lightning_memlong.cli.predict import load_for_inference, read_one, refuse_what_is_known
from lightning_memlong.cli.run_folders import last_checkpoint
from lightning_memlong.cli.trainer import Trainer
from lightning_memlong.config import require
from lightning_memlong.distributed import note
from lightning_memlong.look.address import PORT, free_port
from lightning_memlong.look.looker import CONTEXT, Looker
from lightning_memlong.memlong import MemLong
from lightning_memlong.model import run_of
from lightning_memlong.training import MemLongModule


class LookTrainer(Trainer):
    """See :class:`lightning.pytorch.Trainer`."""

    def look(
        self,
        model: MemLongModule,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        bank: str | None = None,
        capacity: int | None = None,
        max_new_tokens: int = 200,
        generation: dict[str, Any] = {},  # noqa: B006  (shown as the default by --help)
        context: int = CONTEXT,
        port: int = PORT,
        open_browser: bool = True,
    ) -> None:
        """Show a book beside its memory, on a page of this machine.

        Args:
            model: Reads and writes.
            datamodule: Its document.
            ckpt_path: Checkpoint to use: last (the newest of all runs), or a .ckpt file.
            bank: File of the document's bank: opened if it is there, else written once the document has been read.
                Without --data.path the text is the one it holds.
            capacity: Size of the bank [tokens], which then evicts as in training; null: all that is read is kept.
            max_new_tokens: Longest answer [tokens].
            generation: Further options of transformers' generate, such as {do_sample: true, temperature: 0.7}.
            context: Tokens of local text in which a sentence is read, with memory and without [tokens].
            port: Port of this machine; 0: any that is free.
            open_browser: Open the page in the browser of this machine.
        """
        options = {"max_new_tokens": max_new_tokens, **generation}
        if datamodule.path is None and bank is not None:
            name, reader, memory = open_alone(self, model, datamodule.window, ckpt_path, bank, options)
        else:
            name, reader, memory = read_one(self, model, datamodule, ckpt_path, bank, capacity, options)
        from lightning_memlong.look.server import serve  # panel: only where the page is shown

        serve(Looker(reader, memory, context), name, datamodule.window, options, port, open_browser)


class LookCLI(MemLongCLI):
    """The command line with ``look``."""

    NAMES = ("look",)
    TALKS = ("look",)
    TRAINER = LookTrainer

    def before_instantiate_classes(self) -> None:
        """Find the page's port before anything slow is done."""
        self.config["look"].port = free_port(self.config["look"].port)
        super().before_instantiate_classes()


def open_alone(
    trainer: Any, module: Any, window: int, ckpt_path: str | None, file: str, options: dict[str, Any]
) -> tuple[str, MemLong, MemoryBank]:
    """A bank whose text is not at hand: that which it holds is shown. As :func:`read_one`.

    Raises:
        UserError: If it cannot be opened, or was made with something else.
    """
    require(Path(file).is_file(), "bank", file, "a file that is there, or one to be written with --data.path",
            "correct the path, or name the text")  # fmt: skip
    reader = load_for_inference(trainer, module, ckpt_path)
    refuse_what_is_known(reader, window, [], options)
    bank = reader.retrieval.open_bank(file, reader.device, reader.long_context.provenance())
    note(f"{int(bank.ends()[0]):,} tokens found in {file}")
    return Path(file).name, reader, bank


def as_options(arguments: list[str]) -> list[str]:
    """What was typed, with the run, bank or text that is named first as the options that mean it.

    They come last: a ``--config`` wins over what stands before it.

    Raises:
        UserError: If there is no such file or folder, or a run is named without a text or bank.
    """
    arguments = ["--data.path" if a == "--text" else a.replace("--text=", "--data.path=", 1) for a in arguments]
    if not arguments or arguments[0].startswith("-"):
        return with_defaults(arguments)
    named, rest = arguments[0], arguments[1:]
    path = Path(named)
    allowed = "a run folder or checkpoint, a bank (.safetensors), or a text file"
    require(path.exists(), "look", named, allowed, "correct the path")
    typed = {a.partition("=")[0] for a in rest}
    if path.suffix == ".safetensors":
        require("--bank" not in typed, "look", named, "one bank", "leave --bank out")
        return with_defaults([*rest, "--bank", named])
    folder = path / "checkpoints"
    if path.suffix != ".ckpt" and not folder.is_dir():
        allowed, of_model = "one text, or a folder of texts", (path / "config.json").is_file()
        fix = f"name the text, and give --model.backbone {named}" if of_model else "leave one of the two out"
        require(not of_model and "--data.path" not in typed, "look", named, allowed, fix)
        return with_defaults([*rest, "--data.path", named])
    given = bool(typed & {"--data.path", "--bank"})
    require(given, "look", named, "a run together with what it is to read", "add --text book.txt, or --bank its bank")
    checkpoint = path if path.suffix == ".ckpt" else last_checkpoint(path)
    return [*_settings_of(checkpoint, rest), *rest, "--ckpt_path", str(checkpoint)]


def _settings_of(checkpoint: Path, rest: list[str]) -> list[str]:
    """The configuration of the run a checkpoint lies in, without its text; in none, the default's. Typed ones win."""
    if config_files(rest):
        return []
    config = (run_of(checkpoint) or checkpoint.absolute().parent) / "config.yaml"
    return ["--config", str(config), "--data.path", "null"] if config.is_file() else with_defaults([])


def main(arguments: list[str]) -> int:
    """Show a run, a bank or a text.

    Returns:
        As :func:`lightning_memlong.cli.main`.
    """
    options: list[str] = []

    def resolve() -> None:
        found = find_spec("panel") is not None or bool({"-h", "--help"} & {*arguments})
        fix = "pip install 'lightning-memlong[look]', or pip install -e '.[look]' in a checkout"
        require(found, "look", "without panel", "with the extra look", fix)
        options.extend(as_options(arguments))

    logging.getLogger("bokeh").setLevel(logging.WARNING)
    return exit_status(resolve) or run(["look", *options], LookCLI)
