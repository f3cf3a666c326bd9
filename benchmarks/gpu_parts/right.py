"""Part ``right``: the checks of ``tests/gpu`` on this device, in a process of their own."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.context import Context, Row

FOLDER = "tests/gpu"
FILES = [
    "test_model.py",
    "test_bank.py",
    "test_writing.py",
    "test_resume.py",
    "test_attention.py",
    "test_two_part.py",
    "test_flex.py",
]
"""In order of importance; FlexAttention last, as each case is compiled for seconds."""
OUTCOME = re.compile(r"^(?:tests/gpu/)?(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)")


def run(context: Context) -> Iterator[Row]:
    """Run them, and give what passed, what failed, and the numbers they measured."""
    files = FILES[4:5] if context.tiny else FILES
    wanted = f"{context.device.type} and joint and 4x1" if context.tiny else context.device.type
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "-k", wanted, "-o",
               "addopts=", *(f"{FOLDER}/{name}" for name in files)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "rows.jsonl"
        output, stopped = _watched(command, context, {"MEMLONG_GPU_ROWS": str(numbers)})
        found = [json.loads(line) for line in numbers.read_text().splitlines()] if numbers.exists() else []
    outcomes = dict(match.groups() for match in map(OUTCOME.match, output.splitlines()) if match)
    yield from _verdict(outcomes, output, stopped)
    yield from _worst(found)


def _watched(command: list[str], context: Context, more: dict[str, str]) -> tuple[str, bool]:
    """What a command prints within the time there is, and whether it had to be ended."""
    paths = [str(context.root), *sys.path]  # unpacked wheels among them
    environment = os.environ | more | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=context.root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=max(1.0, context.clock.left))
            stopped = False
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        return log.read(), stopped


def _verdict(outcomes: dict[str, str], output: str, stopped: bool) -> Iterator[Row]:
    """How many checks passed, and each that failed."""
    passed = sum(outcome == "PASSED" for outcome in outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    skipped = sum(outcome == "SKIPPED" for outcome in outcomes.values())
    reasons = [line for line in output.splitlines() if re.match(r"^(/|E  )", line) and "Error" in line]
    if not outcomes and stopped:
        yield Row("checks", status="stopped", note="time was over before any had run")
        return
    if not outcomes:
        last = " ".join(output.strip().splitlines()[-3:])
        yield Row("checks", status="failed", note=f"none was run: {last[-300:]}")
        return
    told = "time was over before all were run" if stopped else ""
    yield Row("checks passed", passed, "checks", note=told)
    yield Row("checks failed", len(failed), "checks", 0, note=f"{skipped} skipped by name")
    for number, name in enumerate(failed):
        reason = reasons[number].split(": ", 1)[-1] if number < len(reasons) else ""
        yield Row(name, status="failed", note=reason[:300])


def _worst(found: list[dict[str, Any]]) -> Iterator[Row]:
    """Of each thing that was measured several times, the worst."""
    worst: dict[str, dict[str, Any]] = {}
    for row in found:
        if row["what"] not in worst or row["number"] > worst[row["what"]]["number"]:
            worst[row["what"]] = row
    for name, row in worst.items():
        cases = sum(other["what"] == name for other in found)
        yield Row(name, row["number"], "", row["goal"], note=f"worst of {cases}, {row['device']}")
