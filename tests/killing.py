"""Kill fit, predict and a sweep at random moments, and let their disk fill, to see what is left of them.

``python -m tests.killing --times 100`` (half an hour on two cores); ``tests/integration/test_killing.py`` does it a few
times. What must hold: nothing half-written is ever taken for whole, what is lost is at most one checkpoint interval,
and the same command goes on to the end that an undisturbed run has, to the last digit.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_memlong.bank import MemoryBank
from lightning_memlong.cli.main import main
from lightning_memlong.sweep import execute as execution
from lightning_memlong.sweep.__main__ import main as sweep
from tests.conftest import write_byte_backbone, write_texts
from tests.integration.helpers import differences, tiny, without_capacity

EVERY, STEPS = 2, 24
"""Optimiser steps between checkpoints, and of a run."""
CHECKPOINTS = f"""trainer:
  callbacks:
    - class_path: callbacks.checkpoint.LastCheckpoint
      init_args: {{every_n_train_steps: {EVERY}}}
    - class_path: tests.integration.helpers.StepNote
      init_args: {{file: FILE}}
"""


class Fault(AssertionError):
    """Something did not hold."""


def need(holds: bool, what: str) -> None:
    """Stop unless it holds."""
    if not holds:
        raise Fault(what)


def in_child(work: Callable[[], int], log: Path) -> int:
    """Begin work in a process of its own, which has everything imported already."""
    if (child := os.fork()) == 0:
        status = 70
        try:
            with log.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            status = work()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def wait(child: int) -> int:
    """Exit status; of one that was killed, less than zero."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(work: Callable[[], int], log: Path, after: float) -> bool:
    """Whether work was killed, after so many seconds; it may have ended before.

    Raises:
        Fault: If it failed by itself.
    """
    child, until = in_child(work, log), time.monotonic() + after
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            need(status == 0, f"exit status {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-2000:]}")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return wait(child) < 0


class Killing:
    """Trials in a folder.

    Args:
        folder: Empty.
        times: How many times each is killed.
        seed: Of the moments.
    """

    def __init__(self, folder: Path, times: int, seed: int) -> None:
        self.folder, self.times, self.moments = folder, times, random.Random(seed)
        self.backbone, self.texts, self.log = folder / "backbone", folder / "texts", folder / "log.txt"
        self.log.touch()
        self.timed(self._prepare)
        os.environ |= {"MEMLONG_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}

    def _prepare(self) -> int:
        # In a child, as all work: threads that the tokenizer begins here would be missed after a fork.
        write_byte_backbone(self.backbone)
        write_texts(self.texts)
        return 0

    def timed(self, work: Callable[[], int]) -> float:
        """Seconds that work takes, which must end well."""
        begin = time.monotonic()
        need((status := wait(in_child(work, self.log))) == 0, f"exit status {status}:\n{self.log.read_text()[-2000:]}")
        return time.monotonic() - begin

    def moment(self, earliest: float, latest: float, killed_already: int) -> float:
        """When to kill [s]; never, once it was done often enough: then the run is to end."""
        return self.moments.uniform(earliest, latest) if killed_already < self.times else float("inf")

    def forget(self) -> None:
        """Sometimes, let caches be written anew, to be killed in that."""
        if self.moments.random() < 0.3:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)

    # ---- fit ----------------------------------------------------------------------------------------------

    def fit_options(self, runs: Path) -> list[str]:
        """A run of seconds, with random selection and dropout: everything random must go on where it was."""
        runs.mkdir(exist_ok=True)
        (runs / "checkpoints.yaml").write_text(CHECKPOINTS.replace("FILE", str(runs / "steps.txt")))
        changes = {"memory.selection": "random", "model.tuning.mode": "lora", "model.tuning.lora_dropout": "0.3",
                   "model.tuning.lora_rank": "2", "trainer.max_steps": STEPS, "trainer.val_check_interval": 5,
                   "trainer.limit_val_batches": 2, "validate_first": "false"}  # fmt: skip
        typed = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        return ["fit", *tiny(self.backbone, self.texts, runs), "--config", str(runs / "checkpoints.yaml"), *typed]

    def fit(self) -> None:
        """Kill training again and again; it goes on from the last checkpoint each time."""
        whole = self.folder / "whole"
        seconds = self.timed(lambda: main(self.fit_options(whole)))
        expected = _last(whole)
        number = at = 0
        while at < self.times:
            number += 1
            runs = self.folder / f"fit-{number}"
            runs.mkdir()
            history: list[str] = []
            while True:
                options = self.fit_options(runs) + (["--ckpt_path", "last"] if _last(runs) else [])
                (runs / "steps.txt").unlink(missing_ok=True)
                self.forget()
                gone = killed(lambda o=options: main(o), self.log, self.moment(0.05, 0.8 * seconds, at))  # type: ignore[misc]
                if not gone:
                    break
                at += 1
                history.append(_history(runs))
                saved, made = _last(runs), _steps(runs)
                reached = saved["global_step"] if saved else 0
                need(reached >= made - EVERY, f"{made} steps were made, {reached} are saved")
            ended = _last(runs)
            need(ended is not None and expected is not None, "no checkpoint at the end")
            for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "memlong", "LocalText"):
                differ = differences(ended[part], expected[part])
                need(
                    not differ,
                    f"{part} differs from an undisturbed run's in {differ}; "
                    f"by {_largest(ended['state_dict'], expected['state_dict'])} in weights; {history}",
                )
            shutil.rmtree(runs)

    # ---- predict ------------------------------------------------------------------------------------------

    def predict(self) -> None:
        """Kill reading; a bank file is there whole or not at all."""
        whole, book = self.folder / "whole.safetensors", self.folder / "book.txt"
        book.write_text(" ".join(file.read_text() for file in sorted(self.texts.iterdir())))
        options = without_capacity(tiny(self.backbone, book, self.folder / "answers"))
        options = ["predict", *options, "--prompt", "kan lor", "--max_new_tokens", "4"]
        seconds = self.timed(lambda: main([*options, "--bank", str(whole)]))
        for number in range(self.times):
            bank = self.folder / f"bank-{number}.safetensors"
            killed(lambda b=bank: main([*options, "--bank", str(b)]), self.log, self.moments.uniform(0.3, 1) * seconds)  # type: ignore[misc]
            if bank.exists():
                need(int(MemoryBank.open(bank).ends()[0]) > 0, "an empty bank")
                need(bank.read_bytes() == whole.read_bytes(), "a bank that is not the whole one's")
                bank.unlink()
            for rest in self.folder.glob(f".bank-{number}*"):
                rest.unlink()

    # ---- a sweep ------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Kill a sweep; it goes on, and what has finished is not made again."""
        file, output = self.folder / "mine.yaml", self.folder / "sweeps"
        file.write_text("axes:\n  memory.policy: [fifo, lru]\nseeds: [0]\n")
        options = tiny(self.backbone, self.texts, output)[2:]
        at = options.index("--trainer.logger.save_dir")  # the sweep says it
        options = [*options[:at], *options[at + 2 :], "--validate_first", "false"]
        command = [str(file), "--output", str(output), *options]
        seconds = self.timed(lambda: sweep(command))
        report = _report(output)
        at = 0
        while at < self.times:
            shutil.rmtree(output)
            finished: dict[Path, int] = {}
            while killed(lambda: sweep(command), self.log, self.moment(0.3 * seconds, seconds, at)):
                at += 1
                now = {f: f.stat().st_mtime_ns for f in output.rglob("results.json")}
                need(all(now.get(f) == when for f, when in finished.items()), "a finished run was made again")
                finished = now
            need(_report(output) == report, f"another report than undisturbed: {_report(output)}, {report}")

    # ---- the disk -----------------------------------------------------------------------------------------

    def full_disk(self) -> None:
        """Let the disk be full after some more bytes each time; told in one line, and once there is room it goes on."""
        disk = self.folder / "disk"
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True
        ).returncode:
            print("full disk: left out, a file system of its own cannot be mounted here")
            return
        try:
            full = sum(self._fill(disk / f"{number}", disk / "filler") for number in range(max(2, self.times // 10)))
            print(f"full disk: {full} times")
            need(full > 0, "the disk was never full")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            status = wait(
                in_child(
                    lambda: main(
                        self.fit_options(self.folder / "x")[:-2] + ["--trainer.logger.save_dir", str(disk / "y")]
                    ),
                    self.log,
                )
            )
            need(status == 2 and "cannot write" in self.log.read_text()[-600:], "a read-only folder is told")
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def _fill(self, runs: Path, filler: Path) -> bool:
        """Whether there was too little room for a run."""
        runs.mkdir()
        options = self.fit_options(runs)
        free = shutil.disk_usage(runs).free - self.moments.randrange(0, 150_000)
        filler.write_bytes(b"x" * max(0, free))
        begin = self.log.stat().st_size
        status = wait(in_child(lambda: main(options), self.log))
        said = self.log.read_bytes()[begin:].decode(errors="replace")
        need(status in (0, 2) and "Traceback" not in said, f"exit status {status}: {said[-2000:]}")
        need(status == 0 or "cannot write" in said, f"not told: {said[-600:]}")
        filler.unlink()
        resumed = options + (["--ckpt_path", "last"] if _last(runs) else [])
        need(wait(in_child(lambda: main(resumed), self.log)) == 0, f"does not go on: {self.log.read_text()[-2000:]}")
        shutil.rmtree(runs)
        return status == 2


def _last(runs: Path) -> dict[str, object] | None:
    """The newest checkpoint of a folder of runs: whatever has the name of one is one."""
    files = sorted(runs.rglob("*.ckpt"), key=lambda f: f.stat().st_mtime_ns)
    found = [torch.load(file, weights_only=True) for file in files]
    need(all("memlong" in checkpoint for checkpoint in found), "a checkpoint without its parts")
    return found[-1] if found else None


def _report(output: Path) -> list[dict[str, str]]:
    """What the report of the sweep says of each run, without times."""
    with (output / "mine" / "report.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "perplexity" in k or k == "state"} for row in csv.DictReader(file)]


def _largest(a: Any, b: Any) -> float:
    """How much the weights differ."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def _history(runs: Path) -> str:
    """What a killed run leaves, for messages."""
    saved, made = _last(runs), _steps(runs)
    folders = sorted(folder.name for folder in runs.glob("memlong/*"))
    return f"{made} made, {saved['global_step'] if saved else None} saved, {folders}"


def _steps(runs: Path) -> int:
    """Steps that were made, as noted by a callback."""
    file = runs / "steps.txt"
    return int(file.read_text().split()[-1]) if file.is_file() and file.read_text().split() else 0


def in_this_process(words: list[str], log: object, lock: object, look: Callable[[], object]) -> int:
    """A run of a sweep without a process of its own, so that both are killed at once."""
    look()
    return main(words[2:])


def run(names: list[str], times: int, seed: int) -> None:
    """Do the trials of these names."""
    execution.run_process = in_this_process  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        trials = Killing(Path(folder), times, seed)
        for name in names:
            begin = time.monotonic()
            getattr(trials, name)()
            print(
                f"{name}: {times} times, {time.monotonic() - begin:.0f} s, nothing half-written, all went on",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["fit", "predict", "sweep", "full_disk"])
    arguments = parser.parse_args()
    try:
        run(arguments.only, arguments.times, arguments.seed)
    except Fault as fault:
        sys.exit(f"does not hold: {fault}")
