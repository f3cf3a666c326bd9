"""Pieces of the command line: a parser that helps, options by name, and configuration files among arguments."""

import argparse
import difflib
import inspect
import re
import sys
import tempfile
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import Namespace, set_dumper
from lightning.pytorch.cli import LightningArgumentParser

from datamodules.documents import DocumentDataModule
from datamodules.local_text import LocalText
from lightning_memlong.config import require
from lightning_memlong.distributed import note
from lightning_memlong.shipped import find_yaml, hides_packaged
from lightning_memlong.training.lightning_private import actions, all_actions

DEBUG = "--debug"
"""Typed anywhere; no setting of a run."""


class Dumper(yaml.SafeDumper):
    """Writes configurations, members of enumerations and texts of a kind of their own included."""


def _represent(dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
    if isinstance(value, Enum):
        return dumper.represent_data(value.value)
    return dumper.represent_str(str(value))


Dumper.add_multi_representer(Enum, _represent)
Dumper.add_multi_representer(str, _represent)

NO_WORDS = "Unable to serialize instance "
"""What jsonargparse writes for an object that was given as it is: a callback's default, mostly."""
not_written: dict[str, str] = {}
"""Of each option that no file can say, what it is; parsing itself writes and reads again, so it is known early."""


def _short_name(path: str) -> str:
    """A class path as shipped files have it, ``datamodules.PG19``, in an installed package too."""
    return re.sub(r"^lightning_memlong\.(?=(datamodules|callbacks)\.)", "", path)


def _without_objects(value: Any) -> Any:
    """A configuration without what no file can say: read again, the defaults are there instead."""
    if isinstance(value, list):
        return [_without_objects(v) for v in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        text = inner.removeprefix(NO_WORDS) if isinstance(inner, str) and inner.startswith(NO_WORDS) else None
        if key == "class_path" and isinstance(inner, str):
            found[key] = _short_name(inner)
        elif text is None:
            found[key] = _without_objects(inner)
        elif text.startswith("<"):
            not_written[key] = text.partition(" at 0x")[0].lstrip("<").rstrip(">")
        else:  # a number or a word, taken for an object where a function would have been right as well
            found[key] = yaml.safe_load(text)
    return found


def dump_yaml(data: Any) -> str:
    """A configuration as YAML, without what it cannot say."""
    known = _without_objects(data)
    return yaml.dump(known, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_dumper("yaml", dump_yaml)


class Parser(LightningArgumentParser):
    """A parser whose complaint about an unknown key names the nearest known ones."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the message with suggestions and exit with status 2."""
        unknown = re.search(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)'|[Uu]nrecognized arguments: -*([\w.]+)", message)
        if unknown:
            near = self._nearest((unknown[1] or unknown[2]).removeprefix("init_args."))
            message += f" Nearest known: {', '.join(near)}." if near else ""
            message += " Fix: correct the key; --help lists all of them."
        if lost := re.search(
            r"module '(?:lightning_memlong\.)?(callbacks|datamodules)' has no attribute '(\w+)'", message
        ):
            message += f" There is no {lost[1]}.{lost[2]}, and here {lost[1]} is the project's. "
            message += "Fix: correct the name, or give a package of yours another one."
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The help, with the options of the default DataModule, which a class to be chosen would hide."""
        for action in actions(self):
            if action.dest == "ckpt_path":  # Lightning's own text offers keywords that have no meaning here
                action.help = "Checkpoint to go on from or to evaluate: last (the newest of all runs), or a .ckpt file."
        text = f"{super().format_help(formatter)}\n  {DEBUG}               Show the traceback of errors.\n"
        if not any(action.dest == "data" for action in actions(self)):
            return text
        options = LightningArgumentParser(add_help=False, usage=argparse.SUPPRESS, description="")
        options.add_class_arguments(LocalText, "data", skip={"tokenizer", "chunk_size", "seed"})
        title = "Options of the default --data, datamodules.LocalText (of others: --data.help datamodules.BookCorpus)"
        return f"{text}\n{title}:\n{options.format_help()}"

    def _nearest(self, key: str) -> list[str]:
        known = self.known_keys()
        if any(name.startswith("data") for name in known):  # a class to be chosen hides its options
            known += [f"data.{name}" for c in (LocalText, DocumentDataModule) for name in _parameters(c)]
        last = {name.rpartition(".")[2]: name for name in known}  # messages may leave out the groups
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        near += [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=2, cutoff=0.7)]
        return list(dict.fromkeys(near or difflib.get_close_matches(key.partition(".")[0], known, n=3, cutoff=0.6)))[:3]

    def known_keys(self) -> list[str]:
        """Dotted names of all options, subcommands' included."""
        return sorted({action.dest for action in all_actions(self)})


def config_files(argv: list[str]) -> list[str]:
    """Files given as ``--config``, in order."""
    files = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a in ("--config", "-c")]
    return files + [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]


def with_files_found(argv: list[str]) -> list[str]:
    """Arguments with each ``--config`` a file that is there: a name of a packaged one becomes its path.

    Raises:
        UserError: For a name of neither a file nor a packaged one.
    """
    found = list(argv)
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            found[i] = "--config=" + find_yaml(word.split("=", 1)[1])
        elif i and argv[i - 1] in ("--config", "-c"):
            found[i] = find_yaml(word)
    return found


def tell_hidden_files(files: list[str], option: str = "config") -> None:
    """Say which of the files is another one than the packaged one of that name."""
    for name in files:
        if (hidden := hides_packaged(name)) is not None:
            note(f"{option}: {name} is the file here, not the packaged one, {hidden}")


def insert_config(argv: list[str], file: str) -> list[str]:
    """Arguments with one more ``--config`` after the first one (after the subcommand if there is none)."""
    at = next((i for i, a in enumerate(argv) if a in ("--config", "-c") or a.startswith("--config=")), None)
    at = 1 if at is None else at + (1 if "=" in argv[at] else 2)
    return [*argv[:at], "--config", file, *argv[at:]]


def parse_over(parser: LightningArgumentParser, argv: list[str], stored: Mapping[str, Any]) -> Namespace:
    """Parse arguments with stored settings as a configuration file just after the first one."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(stored), file)
        file.flush()
        return parser.parse_args(insert_config(argv, file.name))


def typed_option(key: str) -> str:
    """An option as a person types it: ``data.window`` for the setting ``data.init_args.window``."""
    return key.replace("init_args.", "")


def resolved_option(option: str, settings: Mapping[str, Any]) -> str:
    """The key that an option, as typed or as resolved, has among settings with dotted keys; itself if it has none."""
    if option in settings:
        return option
    return next((key for key in settings if typed_option(key) == typed_option(option)), option)


def plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values."""
    return yaml.safe_load(parser.dump(config, skip_none=False, skip_link_targets=False))


def _parameters(corpus: Any) -> set[str]:
    """Names of the options of a DataModule's own."""
    return set(inspect.signature(corpus.__init__).parameters) - {"self", "kwargs"}


def open_data(name: str, options: str | Mapping[str, Any], config: Mapping[str, Any]) -> DocumentDataModule:
    """Another corpus beside that of a configuration, set up for testing.

    Args:
        name: What it is called, in titles and messages.
        options: Its path; or options of the data group, and ``class_path``, that differ from the configuration's.
        config: The configuration of a subcommand, as plain values.

    Raises:
        UserError: For an unknown class or option, or a corpus that cannot be read.
    """
    key = f"evaluation.corpora.{name}"
    given = {"path": options} if isinstance(options, str) else dict(options)
    class_path = given.pop("class_path", config["data"]["class_path"])
    module, _, class_name = (class_path if "." in class_path else f"datamodules.{class_path}").rpartition(".")
    corpus: Any = None
    try:
        corpus = getattr(import_module(module), class_name, None)
    except ImportError:
        pass  # told below, with what would be right
    ok = isinstance(corpus, type) and issubclass(corpus, DocumentDataModule)
    require(ok, f"{key}.class_path", class_path, "a class of datamodules, such as datamodules.PG19", "correct it")
    known = _parameters(corpus) | _parameters(DocumentDataModule)
    for option, value in given.items():
        require(option in known, f"{key}.{option}", value, "one of " + ", ".join(sorted(known)), "correct the name")
    shared = {k: v for k, v in config["data"]["init_args"].items() if k in known and k != "path"}
    linked = {"tokenizer": config["model"]["backbone"], "chunk_size": config["memory"]["chunk_size"]}
    data = corpus(**{**shared, **linked, **given})
    data.setup("test")
    return data
