"""The last numbers of a run, ``results.json``: that it has ended, and with what."""

import csv
import json
from pathlib import Path

import lightning as L

from lightning_memlong.cli.run_folders import run_folder
from lightning_memlong.cli.run_record import suffix_of

RESULTS = {"fit": "after", "validate": "metrics", "test": "metrics"}
"""Where ``results.json`` of a subcommand has what its run ended with."""
HEADINGS = {"before": "before training", "after": "after training", "metrics": ""}
"""Of results in the table that is printed."""
HEADINGS_BEFORE_KEYS = {"after": "after training", "metrics": ""}
"""The same in files of before there were keys, which were written by the headings of the printed table."""


def results_file(folder: Path, subcommand: str) -> Path:
    """Where a run's last numbers are."""
    return folder / f"results{suffix_of(subcommand)}.json"


def write_results(trainer: L.Trainer, subcommand: str, results: dict[str, dict[str, float]]) -> None:
    """Write the last numbers of a run as ``results.json`` (``results_test.json`` and so on): that it has ended.

    Args:
        trainer: Of the run.
        subcommand: What was run.
        results: ``before`` and ``after`` (fit) or ``metrics`` (validate, test) -> metrics.

    Digests of the texts go with them, so that what was measured on others can be told.
    """
    if (folder := run_folder(trainer)) is None or not trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / ".results"
    streams = getattr(getattr(trainer, "datamodule", None), "streams", {})
    facts = {"steps": trainer.global_step, "texts": {part: stream.digest() for part, stream in streams.items()}}
    unfinished.write_text(json.dumps({**facts, **results}, indent=2) + "\n")
    unfinished.replace(results_file(folder, subcommand))


def first_validation(folder: Path) -> dict[str, float]:
    """What the untrained model gave, of a run that goes on: what its ``metrics.csv`` begins with; else nothing."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return {}
    with file.open(newline="") as opened:
        first = next(csv.DictReader(opened), {})
    return {k.removeprefix("val/"): float(v) for k, v in first.items() if k.startswith("val/") and v}


def read_results(folder: Path, subcommand: str) -> dict[str, float] | None:
    """What a run ended with, of a file of :func:`write_results`; None: there is no such file."""
    file = results_file(folder, subcommand)
    if not file.is_file():
        return None
    key, found = RESULTS[subcommand], json.loads(file.read_text())
    return found[key if key in found else HEADINGS_BEFORE_KEYS[key]]


def read_texts(folder: Path, subcommand: str) -> dict[str, str]:
    """Digests of the text a finished run has read, by split; nothing where it does not say."""
    found = json.loads(results_file(folder, subcommand).read_text())
    return dict(found.get("texts", {}))


def stage_metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    """The numbers a trainer has of a stage (``val``, ``test``), without it in their names."""
    return {k.removeprefix(f"{stage}/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith(stage)}
