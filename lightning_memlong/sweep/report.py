"""The report of a sweep: one table and one figure an axis, paired with the baseline seed by seed."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lightning_memlong.cli import console as shown
from lightning_memlong.cli.parser import resolved_option
from lightning_memlong.cli.results import read_texts, results_file
from lightning_memlong.cli.run_record import OUTCOMES, add_summary, hyperparameters, suffix_of
from lightning_memlong.distributed import say
from lightning_memlong.evaluation.base import Report
from lightning_memlong.sweep.execute import results
from lightning_memlong.sweep.figures import draw_axis
from lightning_memlong.sweep.plan import Plan
from lightning_memlong.sweep.trials import BASELINE, Run, Trial

COLUMNS = ("perplexity", "perplexity_memory_off", "perplexity_ratio")
Found = dict[int, dict[str, float]]
"""Seed -> what its run measured."""


@dataclass
class Measured:
    """What the finished runs of a sweep have measured."""

    plan: Plan
    found: dict[str, Found]
    """Trial -> seed -> numbers."""

    @classmethod
    def of(cls, plan: Plan) -> "Measured":
        """Read the run folders."""
        found: dict[str, Found] = {trial.name: {} for trial in plan.trials}
        for run in plan.runs():
            if (numbers := results(run)) is not None:
                found[run.trial.name][run.seed] = numbers | _speed(run.folder)
        return cls(plan, found)

    def changes(self, trial: Trial) -> list[float]:
        """Perplexity by the baseline's of the same seed, less 1 [%], of each seed that both have."""
        mine, base = self.found[trial.name], self.found.get(BASELINE, {})
        return [100 * (mine[s]["perplexity"] / base[s]["perplexity"] - 1) for s in mine if s in base]

    def values(self, trial: Trial, column: str) -> list[float]:
        """A number of each seed, where it was measured."""
        return [numbers[column] for numbers in self.found[trial.name].values() if column in numbers]

    def row(self, label: str, trial: Trial) -> dict[str, str]:
        """A row of a table."""
        changes, seeds = self.changes(trial), len(self.found[trial.name])
        leaks = " (LEAKS)" if trial.settings["memory.query"] == "current" and trial.settings["memory.enabled"] else ""
        mine = " (baseline)" if trial.name == BASELINE and label != BASELINE else ""
        return {
            "": label + mine + leaks,
            "perplexity": spread(self.values(trial, "perplexity"), 3),
            "change [%]": "" if trial.name == BASELINE else spread(changes, 2, sign="+"),
            "better": ""
            if trial.name == BASELINE or not changes
            else f"{sum(c < 0 for c in changes)} of {len(changes)}",
            "memory off": spread(self.values(trial, "perplexity_memory_off"), 3),
            "on / off": spread(self.values(trial, "perplexity_ratio"), 4),
            "tokens/s": spread(self.values(trial, "tokens_per_second"), 0),
            "runs": f"{seeds} of {len(self.plan.sweep.seeds)}",
        }


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and standard deviation, as text; of the finite ones where some are not."""
    if not values:
        return "-"
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "nan"
    mean = f"{fmean(finite):{sign},.{digits}f}"
    text = mean if len(finite) < 2 else f"{mean} ± {stdev(finite):,.{digits}f}"
    return text if len(finite) == len(values) else f"{text} ({len(values) - len(finite)} nan)"


def _rank(values: list[float]) -> float:
    """What the best comes first by: the mean, and last what has none."""
    mean = fmean(values or [math.nan])
    return mean if math.isfinite(mean) else math.inf


def _speed(folder: Path) -> dict[str, float]:
    """Median tokens a second of a run's training steps, where they were logged."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return {}
    with file.open(newline="") as stream:
        speeds = [row.get("cost/tokens_per_second") for row in csv.DictReader(stream)]
    return {"tokens_per_second": median(float(s) for s in speeds if s)} if any(speeds) else {}


def _data(measured: Measured) -> list[dict[str, Any]]:
    """One row a run."""
    varied = sorted(
        {option for point in measured.plan.points for value in point.trial.axes.values() for option in value.options}
    )
    rows = []
    for run in measured.plan.runs():
        numbers = measured.found[run.trial.name].get(run.seed)
        settings = {option: run.settings.get(resolved_option(option, run.settings)) for option in varied}
        state = "finished" if numbers is not None else "not finished"
        row = {"cell": run.trial.name, "seed": run.seed, "state": state, **settings, "steps": run.trial.steps}
        rows.append(row | {c: (numbers or {}).get(c) for c in (*COLUMNS, "tokens_per_second")})
    return rows


def make_report(plan: Plan) -> Report:
    """Tables, numbers and figures of what has finished."""
    measured = Measured.of(plan)
    baseline = next((trial for trial in plan.trials if trial.name == BASELINE), None)
    tables, figures = {}, {}
    for axis in dict.fromkeys(point.axis for point in plan.points):
        points = [point for point in plan.points if point.axis == axis]
        on_axis = [point.trial for point in points]
        rows = [(f"{_text(p.value)}{', ' * bool(p.others)}{p.others}", p.trial) for p in points]
        if plan.sweep.search.space:  # the best first
            rows.sort(key=lambda row: _rank(measured.values(row[1], "perplexity")))
        if baseline is not None and baseline not in on_axis:
            rows.insert(0, (BASELINE, baseline))
        tables[axis] = [measured.row(*row) for row in rows]
        drawn = [(p.value, p.others, measured.changes(p.trial) if baseline else measured.values(p.trial, "perplexity"))
                 for p in points]  # fmt: skip
        if any(values for *_, values in drawn):
            figures[axis.replace("/", "-")] = draw_axis(axis, drawn, relative=baseline is not None)
    return Report(f"Sweep {plan.name}", _notes(plan, measured), tables, _data(measured), figures)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _notes(plan: Plan, measured: Measured) -> list[str]:
    finished = [run for run in plan.runs() if run.seed in measured.found[run.trial.name]]
    after = "after training on " + (f"{plan.sweep.tokens:,} tokens" if plan.sweep.tokens else "trainer.max_steps steps")
    notes = [
        f"Perplexity of the validation text {after if plan.sweep.subcommand == 'fit' else 'without training'}; "
        f"mean ± standard deviation over seeds {', '.join(map(str, plan.sweep.seeds))}.",
        "change: by the perplexity of the baseline with the same seed, so that what a seed does to both drops out; "
        "better: in how many seeds it is lower. With few seeds neither is a test.",
        "memory off: the same weights and tokens without memory.",
        f"{len(finished)} of {len(plan.runs())} runs have finished.",
    ]
    if any(run.trial.settings["memory.query"] == "current" for run in finished):
        notes.append("LEAKS: the query sees the text that is predicted; no fair number.")
    commits = sorted({_commit(run) for run in finished})
    if len(commits) > 1:
        notes.append(f"Made with several versions of the code: {', '.join(commits)}.")
    if other := _on_other_text(finished):
        notes.append(
            f"NOT COMPARABLE: the text has changed since {', '.join(other)} ran. Delete the folders of those runs and "
            "give the same command, which makes them again."
        )
    return notes


def _on_other_text(runs: list[Run]) -> list[str]:
    """Names of runs that did not read what the last one to finish has read."""
    texts = {run.name: read_texts(run.folder, run.subcommand) for run in runs}
    at = {run.name: results_file(run.folder, run.subcommand).stat().st_mtime for run in runs}
    newest = texts[max(at, key=lambda name: at[name])] if at else {}
    known = [name for name, text in texts.items() if text]
    return sorted(n for n in known if any(texts[n][part] != newest[part] for part in texts[n].keys() & newest.keys()))


def _commit(run: Run) -> str:
    return str(json.loads((run.folder / f"run{suffix_of(run.subcommand)}.json").read_text())["git_commit"])


def write_report(plan: Plan) -> None:
    """Write and print the report of what has finished; a report that is there is replaced."""
    report = make_report(plan)
    if not any(row["state"] == "finished" for row in report.data):
        say(f"No run of {plan.name} has finished; there is nothing to report.")
        return
    for old in plan.folder.glob("events.out.tfevents.*"):  # TensorBoard would show every old one as well
        old.unlink()
    # The sweep's runs do not say which columns the HParams tab has, its report does: those in which trials differ.
    logger = TensorBoardLogger(plan.folder, name="", version="")
    add_summary(logger.experiment, hparams(_varied(plan), dict.fromkeys(OUTCOMES, 0.0))[0])
    shown.write_report(report, "report", plan.folder, [logger])
    logger.experiment.close()
    shown.show_report(report, "report", plan.folder, plan.folder)


def _varied(plan: Plan) -> dict[str, Any]:
    """The settings in which trials differ, with a value each."""
    trials = [hyperparameters(trial.settings) for trial in plan.trials]
    keys = sorted({key for trial in trials for key in trial})
    differ = [key for key in keys if len({str(trial.get(key)) for trial in trials}) > 1]
    return {"seed_everything": 0} | {key: next(trial[key] for trial in trials if key in trial) for key in differ}
