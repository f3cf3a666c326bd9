"""One run of a sweep, as a process of its own: never made twice, gone on with where it was cut off."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_memlong.cli.results import read_results
from lightning_memlong.errors import UserError
from lightning_memlong.sweep.trials import PROGRAM, TRAIN, Run

Watch = Callable[[int], None]
"""Told, while a run is going, how many steps it has made."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    name: str
    state: str
    """``finished``, ``failed``, or ``elsewhere``: another process is at it."""
    seconds: float = 0.0
    reason: str = ""
    """Of a failure: the last that the run said."""


def results(run: Run) -> dict[str, float] | None:
    """What a finished run has measured; None: it has not finished."""
    return read_results(run.folder, run.subcommand) if _noted(run.folder) else None


def check_folder(run: Run) -> None:
    """Refuse to go on in a folder that holds a run of other settings.

    Raises:
        UserError: If it does.
    """
    noted = _noted(run.folder)
    mine = json.loads(json.dumps(run.settings, default=str))
    differ = [f"{k}: {noted.get(k)!r} there, {mine.get(k)!r} here"
              for k in noted | mine if noted.get(k) != mine.get(k)] if noted else []  # fmt: skip
    if differ:
        raise UserError(
            f"{run.folder} holds a run of other settings ({'; '.join(differ[:3])}). Allowed: a folder whose runs were "
            "made with the sweep as it is now. Fix: give the sweep another --name, or delete the folder."
        )


def _noted(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def command(run: Run) -> list[str]:
    """What a person would type to make this run alone; from its last checkpoint, if it has one."""
    return [*(["python", os.path.relpath(TRAIN)] if TRAIN else ["memlong"]), *_arguments(run)]


def _arguments(run: Run) -> list[str]:
    saved = run.folder / "checkpoints" / "last.ckpt"
    resumed = ["--ckpt_path", str(saved)] if run.subcommand == "fit" and saved.is_file() else []
    return [*run.arguments, *resumed]


def execute(run: Run, watch: Watch | None = None) -> Outcome:
    """Make a run, unless it is made.

    Args:
        run: The run.
        watch: Called about once a second while it is going.
    """
    if results(run) is not None:
        return Outcome(run.name, "finished")
    run.folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with (run.folder / ".lock").open("w") as lock, (run.folder / "log.txt").open("a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Outcome(run.name, "elsewhere")
        if results(run) is not None:  # by another process, in the meantime
            return Outcome(run.name, "finished")
        said = log.tell()
        words = [*PROGRAM, *_arguments(run)]
        (run.folder / "sweep.json").write_text(json.dumps(run.settings, indent=1, default=str) + "\n")
        status = run_process(words, log, lock, lambda: watch and watch(_steps(run)))
    seconds = time.monotonic() - begun
    if status == 0 and results(run) is not None:
        return Outcome(run.name, "finished", seconds)
    return Outcome(run.name, "failed", seconds, last_words(run.folder / "log.txt", said, status))


def run_process(words: list[str], log: IO[str], lock: IO[str], look: Callable[[], Any]) -> int:
    """Run a process to its end and return its status."""
    # It inherits the lock, which so outlives this process if that is killed.
    process = subprocess.Popen(
        words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()], start_new_session=True
    )  # so that Ctrl-C reaches it once, from here
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                look()
    finally:
        if process.poll() is None:  # interrupted: let it write what it has
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def _steps(run: Run) -> int:
    """Steps that a run has logged so far; 0 where that cannot be told, since it may be writing just now."""
    try:
        header, *lines = (run.folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[header.split(",").index("step")]) + 1
    except (OSError, ValueError, IndexError):
        return 0


def last_words(file: Path, since: int, status: int) -> str:
    """Why a run failed: its error message, the signal that killed it, or its last line."""
    with file.open() as log:
        log.seek(since)
        lines = [line.strip() for line in log if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    if not told and status < 0:
        return f"killed ({signal.Signals(-status).name})"
    return f"status {status}: {[*(lines[-1:] or ['it said nothing']), *told][-1]}"
