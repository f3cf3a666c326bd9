"""``benchmarks/gpu.py``: every part at a tiny size on the CPU, and what becomes of one that fails or hangs."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import SHARES, interrupted_after, measure
from benchmarks.gpu_parts.context import Clock, Context, Row, Stopped, attempt
from benchmarks.gpu_parts.report import Report
from tests.integration.helpers import ROOT


def command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "benchmarks/gpu.py", "--shape", "tiny", "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(given, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.long
def test_every_part_gives_rows(byte_backbone: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "--weights", str(byte_backbone))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert list(found["parts"]) == list(SHARES)
    for part, rows in found["parts"].items():
        numbers = [row for row in rows if row["value"] is not None]
        assert len(numbers) > 2 and {row["status"] for row in rows} <= {"measured", "skipped"}, part
    facts = found["facts"]
    assert facts["seed"] == 0 and facts["torch"] == torch.__version__ and facts["commit"] and facts["tiny"]
    page = (tmp_path / "gpu-cpu.md").read_text()
    assert all(f"## {part}" in page for part in SHARES)
    assert all(f"| {row['what']} |" in page for rows in found["parts"].values() for row in rows)


def test_a_failure_is_told_and_ends_with_1(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "tuning", "attention", "--weights", str(tmp_path / "nothing"))
    assert done.returncode == 1
    parts = json.loads((tmp_path / "gpu-cpu.json").read_text())["parts"]
    assert list(parts) == ["attention", "tuning"] and "it is not there" in parts["tuning"][0]["note"]
    assert "| tuning | failed |" in (tmp_path / "gpu-cpu.md").read_text()


@pytest.fixture
def context() -> Context:
    return Context(torch.device("cpu"), True, 0, ROOT, clock=Clock(60))


def part(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_parts.made_up", SimpleNamespace(run=run))


def statuses(report: Report) -> list[str]:
    return [row["status"] for row in json.loads(report.file.read_text())["parts"]["made_up"]]


def test_what_was_measured_before_a_failure_is_kept(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Context) -> Iterator[Row]:
        yield Row("a number", 1.5, "s", 2.0)
        raise torch.OutOfMemoryError("no room")

    part(monkeypatch, broken)
    report = Report(tmp_path, {"card": "A Card 80GB"})
    assert measure("made_up", context, report), "the next part goes on"
    assert statuses(report) == ["measured", "failed", "measured"] and report.failed
    assert report.file.name == "gpu-a-card-80gb.json"
    again = Report(tmp_path, {"card": "A Card 80GB"}, keep=True)
    assert again.parts == report.parts and again.failed


def test_one_measurement_fails_and_the_next_is_made(context: Context) -> None:
    def bad() -> Iterator[Row]:
        raise ValueError("of no use")
        yield

    rows = [*attempt(context, "bad", bad), *attempt(context, "good", lambda: iter([Row("good", 1.0)]))]
    assert [row.status for row in rows] == ["failed", "measured"] and "of no use" in rows[0].note
    context.clock = Clock(0)
    with pytest.raises(Stopped):
        next(attempt(context, "late", bad))


def test_a_part_that_hangs_is_interrupted(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(Stopped, match="interrupted after"), interrupted_after(0.1, Stopped):
        time.sleep(60)
    assert time.monotonic() - begin < 5

    def over(context: Context) -> Iterator[Row]:
        raise Stopped
        yield

    part(monkeypatch, over)
    report = Report(tmp_path, {"card": "card"})
    assert measure("made_up", context, report) and statuses(report)[0] == "stopped" and not report.failed


def test_goals() -> None:
    assert Row("a", 1.0, goal=1.0).met and not Row("a", 1.1, goal=1.0).met and Row("a", 1.1).met is None
    assert Row("a", 0.98, goal=0.97, most=False).met and Row("a", status="failed", goal=1.0).met is None
