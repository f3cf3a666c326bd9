"""One evaluation in parts, each a process: on this machine, a Ray cluster or SLURM; then one report of all."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from jsonargparse import set_parsing_settings
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lightning_memlong.cli.console import wide_console
from lightning_memlong.cli.messages import program_status
from lightning_memlong.cli.parser import Parser
from lightning_memlong.config import require, require_choice
from lightning_memlong.distributed import say
from lightning_memlong.sweep.execute import Outcome, Watch, last_words, run_process
from lightning_memlong.sweep.launchers import LAUNCHERS, Launch, Make
from lightning_memlong.sweep.settings import Launcher
from lightning_memlong.sweep.trials import PROGRAM

DESCRIPTION = """Spread one evaluation over processes, each of which measures some of its documents, and report on all.

The arguments of train.py follow, test first:

  python -m lightning_memlong.sweep.spread --parts 8 --launcher slurm test --config conf/memlong.yaml
    --config conf/eval/perplexity.yaml --evaluation.documents 8 --data.path my_texts

What is measured is kept, by whatever parts: the same command goes on with what is left, be it in fewer or more."""


@dataclass
class Spread:
    """How an evaluation is spread."""

    parts: int = 2
    """Processes; each measures every so many-th document."""
    launcher: Launcher = "local"
    """Where they run: local (here, all at once), slurm (a job array, by submitit; extra: slurm), ray (extra: ray)."""
    launcher_args: dict[str, Any] = field(default_factory=dict)
    """As for a sweep. slurm: parameters of submitit's executor, and cluster: local to try it. ray: options of a task,
    and address."""

    def __post_init__(self) -> None:
        """Check the values."""
        require(self.parts >= 1, "parts", self.parts, "1 or more", "raise it")
        require_choice("launcher", self.launcher, Launcher)
        ok = not self.launcher_args or self.launcher != "local"
        require(ok, "launcher_args", self.launcher_args, "nothing for launcher local", "leave it out, or set launcher")


@dataclass(frozen=True)
class PartRun:
    """One part, as a process."""

    number: int
    of: int
    folder: Path
    """The run folder of the evaluation; its log goes there as well."""
    arguments: tuple[str, ...]
    """Of ``train.py``."""

    @property
    def name(self) -> str:
        """Of its log."""
        return f"part-{self.number}-of-{self.of}"


def make_part(run: PartRun, watch: Watch | None = None) -> Outcome:
    """Measure what is left of a part.

    Args:
        run: The part.
        watch: Called about once a second while it is going.
    """
    begun = time.monotonic()
    file = run.folder / f"{run.name}.txt"
    with (run.folder / f".{run.name}.lock").open("w") as lock, file.open("a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Outcome(run.name, "elsewhere", reason="another process is at it")
        said = log.tell()
        words = [*PROGRAM, *run.arguments, "--part", f"{run.number}/{run.of}"]
        status = run_process(words, log, lock, lambda: watch and watch(0))
    seconds = time.monotonic() - begun
    if status == 0:
        return Outcome(run.name, "finished", seconds)
    return Outcome(run.name, "failed", seconds, last_words(file, said, status))


class _StopAsked(Exception):
    """Ends a process that another thread waits for."""


def at_once(
    runs: list[PartRun], options: dict[str, Any], folder: Path, watch: Callable[[PartRun], Watch], make: Make
) -> Iterator[Outcome]:
    """All parts at the same time, as processes of this machine, whose cores they share; arguments as for a launcher."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(runs))))
    stop = Event()

    def watched(run: PartRun) -> Watch:
        look = watch(run)

        def stopping(steps: int) -> None:
            if stop.is_set():
                raise _StopAsked
            look(steps)

        return stopping

    with ThreadPoolExecutor(len(runs)) as pool:
        waiting = [pool.submit(make, run, watched(run)) for run in runs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            stop.set()  # Ctrl-C is told to this thread alone


def count_shares(arguments: list[str]) -> dict[str, Any] | int:
    """What ``train.py`` says there is to be shared out, once it has checked everything; or the status it ended with."""
    words = [*PROGRAM, *arguments, "--part", "count"]
    found = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    lines = [line for line in found.stdout.splitlines() if line.startswith('{"units"')]
    return json.loads(lines[-1]) if found.returncode == 0 and lines else found.returncode or 1


def _launch(launch: Launch, spread: Spread, runs: list[PartRun], shares: dict[str, Any]) -> list[Outcome]:
    """Start all parts, and give back the outcomes of those that did not finish."""
    folder, undone = runs[0].folder, []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=wide_console()) as progress:
        task = progress.add_task(f"{len(runs)} parts", total=shares["measurements"])

        def look(*_: object) -> None:
            made = sum(file.read_bytes().count(b"\n") for file in folder.glob(shares["files"]))
            progress.update(task, completed=min(made, shares["measurements"]))

        for outcome in launch(runs, dict(spread.launcher_args), folder, lambda run: look, make_part):
            look()
            told = f"{outcome.state:>9}  {outcome.name}  {outcome.seconds:,.0f} s  {outcome.reason}"
            progress.console.print(told, markup=False, highlight=False, soft_wrap=True)
            if outcome.state != "finished":
                undone.append(outcome)
    return undone


def spread_over(spread: Spread, arguments: list[str]) -> int:
    """Measure all parts, and report.

    Args:
        spread: How.
        arguments: Of ``train.py``, ``test`` first.

    Returns:
        0; 1 if a part failed; or what ``train.py`` ended with.
    """
    shares = count_shares(arguments)
    if isinstance(shares, int):
        return shares
    parts = min(spread.parts, shares["units"])
    if parts < spread.parts:
        say(f"There are {parts} to share out: {parts} parts instead of {spread.parts}.")
    folder = Path(shares["folder"]).absolute()
    runs = [PartRun(number, parts, folder, tuple(arguments)) for number in range(1, parts + 1)]
    launch = at_once if spread.launcher == "local" else LAUNCHERS[spread.launcher]
    say(f"{parts} parts of {shares['measurements']:,} measurements; logs: {folder}/part-*.txt", flush=True)
    undone = _launch(launch, spread, runs, shares)
    if undone:
        say(f"{len(undone)} of {parts} parts are not done; the same command goes on with what is left, then reports.")
        return 1
    return subprocess.run([*PROGRAM, *arguments]).returncode


def read(arguments: list[str]) -> tuple[Spread, list[str]]:
    """How to spread, and what: the words from ``test`` on.

    Raises:
        UserError: For values that cannot be used.
    """
    at = arguments.index("test") if "test" in arguments else len(arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="python -m lightning_memlong.sweep.spread", description=DESCRIPTION)
    parser.add_class_arguments(Spread)
    parsed = parser.parse_args([word for word in arguments[:at] if word != "--"])
    rest = arguments[at:]
    require(bool(rest), "command", " ".join(arguments), "options, then test and its own", "see --help")
    given = [word for word in rest if word.partition("=")[0] == "--part"]
    require(not given, "part", given, "nothing: parts says it", "leave it out")
    return Spread(**{name: parsed[name] for name in Spread.__dataclass_fields__}), rest


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a part failed; 2 after a mistake that a person can fix; 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return program_status(
        lambda: spread_over(*read(given)), "What is measured is kept; the same command goes on from there."
    )


if __name__ == "__main__":
    from lightning_memlong.sweep import spread  # another process finds what is sent to it by this name

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # parts are then told to stop, too
    sys.exit(spread.main())
