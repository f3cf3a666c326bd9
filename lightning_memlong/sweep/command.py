"""The command: reads a sweep file, makes its runs, goes on past failures, and writes the report."""

import shlex
import sys
import time
from pathlib import Path

from jsonargparse import ActionConfigFile, set_parsing_settings
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_memlong.cli.console import wide_console
from lightning_memlong.cli.messages import program_status
from lightning_memlong.cli.parser import Parser, tell_hidden_files
from lightning_memlong.cli.run_folders import check_writable
from lightning_memlong.config import require
from lightning_memlong.distributed import say
from lightning_memlong.shipped import find_yaml
from lightning_memlong.sweep.execute import Outcome, Watch, check_folder, command, results
from lightning_memlong.sweep.launchers import LAUNCHERS
from lightning_memlong.sweep.plan import Plan
from lightning_memlong.sweep.report import write_report
from lightning_memlong.sweep.search import search
from lightning_memlong.sweep.settings import Sweep
from lightning_memlong.sweep.trials import Run

DESCRIPTION = """Make the runs of a sweep file, one after the other or through a launcher, and report them.

The same command goes on with an interrupted sweep: finished runs are kept, a run that was cut off goes on from its
last checkpoint, failed ones are tried again. Options of fit given beside the sweep's own are those of every run:

  memlong sweep sweeps/top_k.yaml --tokens 100000 --data.path my_texts"""

OF_RUNS = {"model", "memory", "data", "trainer", "config", "validate_first", "seed_everything"}
"""Groups and options of runs; all others are the sweep's."""


def _parser() -> Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="memlong sweep", description=DESCRIPTION)
    parser.add_argument("--file", action=ActionConfigFile, help="The sweep file; the first argument is one too.")
    parser.add_class_arguments(Sweep)
    parser.add_argument("--dry_run", action="store_true", help="Print the commands of the runs, and make none.")
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The sweep's own arguments, and those of its runs."""
    mine: list[str] = []
    runs: list[str] = []
    target = mine
    for word in arguments:
        if word.startswith("--"):
            target = runs if word[2:].partition("=")[0].partition(".")[0] in OF_RUNS else mine
        target.append(word)
    return mine, runs


def read(arguments: list[str]) -> tuple[Sweep, str, list[str], bool]:
    """The sweep, its name, the options of every run, and whether to print the commands only.

    Raises:
        UserError: For a file that is not there, or values that cannot be used.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--file", *arguments]
    parser = _parser()
    mine, typed = _split(arguments)
    mine = [find_yaml(word, "file") if before == "--file" else word
            for before, word in zip(["", *mine], mine, strict=False)]  # fmt: skip
    files = [word for option, word in zip(mine, mine[1:], strict=False) if option == "--file"]
    tell_hidden_files(files, "file")
    parsed = parser.parse_args(mine)
    require(bool(files), "file", None, "a sweep file", "name one as the first argument, such as sweeps/top_k.yaml")
    values = {key: value for key, value in parser.instantiate_classes(parsed).items(branches=True) if "." not in key}
    dry = values.pop("dry_run")
    values.pop("file")
    sweep = Sweep(**values)
    return sweep, sweep.name or Path(files[-1]).stem, typed, dry


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a run failed; 2 after a mistake that a person can fix; 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return program_status(
        lambda: _sweep(*read(given)), "What is finished is kept; the same command goes on from there."
    )


def _sweep(sweep: Sweep, name: str, typed: list[str], dry: bool) -> int:
    plan = Plan(sweep, name, typed)
    if dry:
        for run in plan.runs():
            print(shlex.join(command(run)))
        if sweep.search.space:
            print(f"# then {sweep.search.trials} trials of {', '.join(sweep.search.space)}, as Optuna chooses")
        return 0
    check_writable(plan.folder)
    failed: list[Outcome] = []
    if sweep.search.space:
        search(plan, lambda runs: failed.extend(_launch(plan, runs)))
    else:
        failed = _launch(plan, plan.runs())
    write_report(plan)
    for outcome in failed:
        why = "another process is at it" if outcome.state == "elsewhere" else outcome.reason
        say(f"Not done: {outcome.name}: {why}\n  {plan.folder / outcome.name / 'log.txt'}")
    if failed:
        names = {outcome.name for outcome in failed}  # a search may have tried one more than once
        every = names | {run.name for run in plan.runs()}
        say(f"{len(names)} of {len(every)} runs are not done; the same command tries them again.")
    return 1 if failed else 0


def _launch(plan: Plan, runs: list[Run]) -> list[Outcome]:
    """Make those runs that are not made, and give back the outcomes of those that still are not."""
    for run in runs:
        check_folder(run)
    todo = [run for run in runs if results(run) is None]
    say(f"{plan.name}: {len(runs)} runs, {len(runs) - len(todo)} of them finished already; folder {plan.folder}",
        flush=True)  # fmt: skip
    if not todo:
        return []
    launch = LAUNCHERS[plan.sweep.launcher]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    undone: list[Outcome] = []
    with Progress(*columns, console=wide_console()) as progress:
        bar = _Bar(progress, todo)
        for outcome in launch(todo, dict(plan.sweep.launcher_args), plan.folder, bar.watch):
            bar.ended(outcome)
            if outcome.state != "finished":
                undone.append(outcome)
    return undone


class _Bar:
    """A bar over all steps of all runs, and a line for each run that has ended."""

    def __init__(self, progress: Progress, runs: list[Run]) -> None:
        self._progress, self._ended = progress, 0
        self._steps = {run.name: _steps(run) for run in runs}
        self._task = progress.add_task("", total=sum(self._steps.values()))

    def watch(self, run: Run) -> Watch:
        """Shows the steps of a run while it is going."""
        self._progress.update(self._task, description=run.name)
        before = time.monotonic()

        def look(steps: int) -> None:
            steps = min(steps, self._steps[run.name])  # the last validation is logged one step later
            shown = f"{run.name}  step {steps} of {self._steps[run.name]}, {time.monotonic() - before:,.0f} s"
            self._progress.update(self._task, description=shown, completed=self._ended + steps)

        return look

    def ended(self, outcome: Outcome) -> None:
        """Note that a run is over."""
        self._ended += self._steps[outcome.name]
        told = f"{outcome.state:>9}  {outcome.name}  {outcome.seconds:,.0f} s  {outcome.reason}"
        self._progress.console.print(told, markup=False, highlight=False, soft_wrap=True)
        self._progress.update(self._task, completed=self._ended)


def _steps(run: Run) -> int:
    return int(run.settings["trainer.max_steps"]) if run.subcommand == "fit" else 1
