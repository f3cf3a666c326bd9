"""Runs an evaluation as a user sees it: progress, a record to go on with, and tables and figures in the run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_memlong.cli.checkpoints import on_device
from lightning_memlong.cli.console import show_report, write_report
from lightning_memlong.cli.run_folders import check_writable, run_folder, tensorboard_folder
from lightning_memlong.cli.run_record import note_settings
from lightning_memlong.distributed import say
from lightning_memlong.evaluation.base import Evaluation, Report, Subject
from lightning_memlong.evaluation.record import Record
from lightning_memlong.progress import token_bar


def evaluate(
    trainer: Any,
    module: Any,
    datamodule: Any,
    evaluation: Evaluation,
    open_data: Callable[..., Any],
    ckpt_path: Any,
    identity: str,
) -> Report:
    """Evaluate a model; what an earlier run of the same ``identity`` has measured is not measured again.

    Raises:
        UserError: If it cannot be evaluated; what was measured before is kept.
    """
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
        record = Record(folder / f"{evaluation.name}-{identity}.jsonl", evaluation.keys)
        before = f"{record.found:,} measurements found, the rest goes on" if record.found else "as it comes"
        say(f"Results, {before}: {record.file}", flush=True)
        _run(evaluation, subject, record)
    report = evaluation.report(record.of(evaluation.planned()))
    write_report(report, evaluation.name, folder, trainer.loggers)
    show_report(report, evaluation.name, folder, tensorboard_folder(trainer))
    return report


def _run(evaluation: Evaluation, subject: Subject, record: Record) -> None:
    try:
        for row in evaluation.run(subject, record):
            record.add(row)
    except KeyboardInterrupt:
        say(f"\nInterrupted. {len(record.measurements):,} measurements are kept; the same command goes on from there.")
        raise SystemExit(130) from None
