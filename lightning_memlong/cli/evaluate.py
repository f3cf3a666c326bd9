"""Runs an evaluation as a user sees it: progress, a record to go on with, and tables and figures in the run folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_memlong.cli.checkpoints import on_device
from lightning_memlong.cli.console import show_report, write_report
from lightning_memlong.cli.run_folders import check_writable, run_folder, tensorboard_folder
from lightning_memlong.cli.run_record import note_settings
from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.parts import Part, open_record, units_of
from lightning_memlong.evaluation.record import Record
from lightning_memlong.progress import token_bar

COUNT = "count"
"""Instead of a part: measure nothing, and say on the last line, as JSON, what there is to be shared out."""

PART_HELP = """Of an evaluation, N/M: measure every M-th document (or whatever it measures whole) from the N-th on,
while other processes measure the others; without --part the same command then reports on all. count: say how many there
are, and measure nothing."""


def check_part(part: str | None, evaluates: bool) -> None:
    """See that a part is one, and of an evaluation.

    Raises:
        UserError: If not.
    """
    if part is not None:
        require(evaluates, "part", part, "beside --evaluation, or a file of conf/eval/", "name one, or leave it out")
    if part not in (None, COUNT):
        Part.named(str(part))


def evaluate(
    trainer: Any,
    module: Any,
    datamodule: Any,
    evaluation: Evaluation,
    open_data: Callable[..., Any],
    ckpt_path: Any,
    identity: str,
    part: str | None = None,
) -> Report | None:
    """Evaluate a model; what earlier runs of the same ``identity`` have measured is not measured again.

    Args:
        trainer: Where results are logged, and how it computes.
        module: The model.
        datamodule: Its text.
        evaluation: What is measured.
        open_data: Opens another text.
        ckpt_path: Weights to be loaded.
        identity: Of all that results depend on.
        part: Which part of it, or :data:`COUNT`; None: all, and then the report.

    Raises:
        UserError: If it cannot be evaluated; what was measured before is kept.
    """
    chosen = None if part in (None, COUNT) else Part.named(str(part))
    module, callback = on_device(trainer, module, ckpt_path)
    with token_bar() as progress:
        subject = Subject(
            module.model, module.tokenizer, callback.config, datamodule, module.backbone_name, open_data, progress,
            trainer.precision_plugin.forward_context, callback.retrieval(module).retriever,
        )  # fmt: skip
        evaluation.prepare(subject)
        for remark in evaluation.remarks:
            say(remark)
        folder = run_folder(trainer) or Path(evaluation.name)
        check_writable(folder)
        if not (folder / "run_test.json").exists():  # one that goes on has the same settings
            note_settings(trainer, module)
        record = open_record(folder, evaluation, identity, chosen)
        if part == COUNT:
            print(json.dumps(_shares(evaluation, folder, identity)))
            return None
        before = f"{record.found:,} measurements found, the rest goes on" if record.found else "as it comes"
        say(f"Results, {before}: {record.file}", flush=True)
        _run(evaluation, subject, record)
    if chosen is not None:
        _say_what_is_left(evaluation, record, chosen)
        return None
    report = evaluation.report(record.of(evaluation.planned()))
    write_report(report, evaluation.name, folder, trainer.loggers)
    show_report(report, evaluation.name, folder, tensorboard_folder(trainer))
    return report


def _shares(evaluation: Evaluation, folder: Path, identity: str) -> dict[str, Any]:
    """How many parts have something to do, how many measurements there are in all, and where files of parts lie."""
    place = {"folder": str(folder), "files": f"{evaluation.name}-{identity}*.jsonl"}
    return {"units": len(units_of(evaluation)), "measurements": len(evaluation.planned()), **place}


def _say_what_is_left(evaluation: Evaluation, record: Record, part: Part) -> None:
    places = units_of(evaluation).values()
    mine = sum(map(part.takes, places))
    what = f"{mine} of {len(places)} measured" if mine else f"nothing to measure: there are {len(places)} to share out"
    made, planned = len(record.of(evaluation.planned())), len(evaluation.planned())
    name, rest = f"Part {part.number} of {part.of}", "the same command without --part reports"
    say(f"{name}: {what}. {made:,} of {planned:,} measurements are made; {rest}.")


def _run(evaluation: Evaluation, subject: Subject, record: Record) -> None:
    try:
        for row in evaluation.run(subject, record):
            record.add(row)
    except KeyboardInterrupt:
        say(f"\nInterrupted. {len(record.measurements):,} measurements are kept; the same command goes on from there.")
        raise SystemExit(130) from None
