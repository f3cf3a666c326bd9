"""An evaluation in parts gives what one run gives, however it is spread."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_memlong.cli.main import main
from lightning_memlong.sweep import spread as spreading
from lightning_memlong.sweep.execute import Outcome
from lightning_memlong.sweep.spread import main as spread
from lightning_memlong.sweep.spread import read
from tests.integration.helpers import EVAL, ROOT, tiny

TIMES = ("seconds",)
"""Columns that no two runs have the same of."""


def grid(tiny_backbone: Path, text_folder: Path, runs: Path, *more: str) -> list[str]:
    small = tiny(tiny_backbone, text_folder, runs)
    return ["test", *small, "--config", str(EVAL / "perplexity.yaml"), "--memory.top_k", "3", "--data.window", "64",
            "--data.stride", "32", "--evaluation.lengths", "[64, 128]", "--evaluation.documents", "3",
            "--evaluation.windows", "2", "--evaluation.settings", "{retrieved: {}}", *more]  # fmt: skip


def measured(runs: Path) -> dict[str, list[str]]:
    """File -> measurements, but for times."""
    return {
        file.name: [json.dumps({k: v for k, v in json.loads(line).items() if k not in TIMES})
                    for line in file.read_text().splitlines()]
        for file in runs.glob("memlong/*/*.jsonl")
    }  # fmt: skip


def rows(runs: Path) -> list[str]:
    return sorted(row for lines in measured(runs).values() for row in lines)


def test_two_parts_are_what_one_run_is(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(grid(tiny_backbone, text_folder, tmp_path / "whole")) == 0
    options = grid(tiny_backbone, text_folder, tmp_path / "parts")
    capsys.readouterr()
    assert main([*options, "--part", "2/2"]) == 0
    told = capsys.readouterr().out
    assert "Part 2 of 2: 1 of 3 measured. 8 of 24 measurements are made" in told and "on / off" not in told
    # Two documents side by side are still those of the part.
    assert main([*options, "--part", "1/2", "--data.batch_size", "2"]) == 0
    parts = measured(tmp_path / "parts")
    assert sorted(len(lines) for lines in parts.values()) == [8, 16] and all("part-" in name for name in parts)
    assert not list((tmp_path / "parts").rglob("perplexity.md")), "no part reports"
    assert main([*options, "--part", "4/4"]) == 0
    assert "Part 4 of 4: nothing to measure: there are 3 to share out" in capsys.readouterr().out
    assert main(options) == 0
    assert len(list((tmp_path / "parts").rglob("*.jsonl"))) == 2, "the report measures nothing"
    whole, joined = ([json.loads(row) for row in rows(tmp_path / place)] for place in ("whole", "parts"))
    assert len(whole) == len(joined) == 24
    for one, other in zip(whole, joined, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert {k: v for k, v in one.items() if not isinstance(v, float | dict)} == {
            k: v for k, v in other.items() if not isinstance(v, float | dict)
        }
    (folder,) = {file.parent for file in (tmp_path / "parts").rglob("*.jsonl")}
    assert "part: null" in (folder / "config_test.yaml").read_text(), "a part is no setting"


def test_bad_parts_are_told(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["test", *tiny(tiny_backbone, text_folder, tmp_path)]
    assert main([*plain, "--part", "1/2"]) == 2
    assert "part='1/2' cannot be used. Allowed: beside --evaluation" in capsys.readouterr().err
    for words, told in (
        (["--parts", "0", *plain], "parts=0 cannot be used. Allowed: 1 or more"),
        (["--launcher_args", "{a: 1}", *plain], "launcher_args={'a': 1}"),
        (["--parts", "2"], "options, then test and its own"),
        ([*plain, "--part", "1/2"], "part=['--part'] cannot be used. Allowed: nothing: parts says it"),
    ):
        assert spread(words) == 2
        assert told in capsys.readouterr().err, told
    with pytest.raises(SystemExit, match="2"):
        spread(["--launcher", "pbs", *plain])
    assert "'local', 'slurm', 'ray'" in capsys.readouterr().err
    found, rest = read(["--parts", "8", "--launcher", "slurm", "--", "test", "--config", "x"])
    assert found.parts == 8 and found.launcher == "slurm" and rest == ["test", "--config", "x"]


@pytest.mark.long
def test_parts_as_processes(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here, more parts than documents; then as a job array, after the measurements of one part were lost."""
    options = grid(tiny_backbone, text_folder, tmp_path / "runs")
    words = [sys.executable, "-m", "lightning_memlong.sweep.spread", "--parts", "5"]
    done = subprocess.run([*words, *options], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "There are 3 to share out: 3 parts instead of 5." in done.stdout and "perplexity.md" in done.stdout
    before = rows(tmp_path / "runs")
    files = sorted((tmp_path / "runs").rglob("*.jsonl"))
    assert len(before) == 24 and [len(file.read_text().splitlines()) for file in files] == [8, 8, 8]
    files[1].unlink()
    folder = files[0].parent
    slurm = ["--parts", "3", "--launcher", "slurm", "--launcher_args", "{cluster: local, timeout_min: 5}"]
    assert spread([*slurm, *options]) == 0
    assert rows(tmp_path / "runs") == before and [len(f.read_text().splitlines()) for f in files] == [8, 8, 8]
    log = folder / "part-2-of-3.txt"
    assert "16 measurements found, the rest goes on" in log.read_text()
    assert spread(["--parts", "2", *options, "--evaluation.lengths", "[60]"]) == 2, "told before any part starts"
    assert "multiples of memory.chunk_size" in capfd.readouterr().err


def test_a_failed_part_is_told_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What parts and the report do is tried above; here, what becomes of it."""
    shares = {"units": 4, "measurements": 12, "folder": str(tmp_path), "files": "*.jsonl"}
    monkeypatch.setattr(spreading, "count_shares", lambda arguments: shares)
    reported: list[list[str]] = []
    monkeypatch.setattr(
        spreading.subprocess, "run", lambda words: reported.append(words[2:]) or SimpleNamespace(returncode=0)
    )
    fails = {2}

    def part(run: spreading.PartRun, watch: Any) -> Outcome:
        watch(0)
        return Outcome(run.name, "failed" if run.number in fails else "finished", 1.0, "killed (SIGKILL)")

    monkeypatch.setattr(spreading, "make_part", part)
    assert spread(["--parts", "3", "test", "--config", "mine.yaml"]) == 1 and not reported
    told = capsys.readouterr().out
    assert "failed  part-2-of-3  1 s  killed (SIGKILL)" in told and told.count("finished  part-") == 2
    assert "1 of 3 parts are not done; the same command goes on" in told
    fails.clear()
    assert spread(["--parts", "9", "test", "--config", "mine.yaml"]) == 0
    assert reported == [["test", "--config", "mine.yaml"]], "once all parts are done, one process reports"
    assert "There are 4 to share out: 4 parts instead of 9." in capsys.readouterr().out
    monkeypatch.setattr(spreading, "count_shares", lambda arguments: 2)
    assert spread(["--parts", "3", "test"]) == 2, "what train.py says of bad settings is said before any part starts"


def test_a_part_is_measured_by_one_process_and_its_failure_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = spreading.PartRun(2, 3, tmp_path, ("test",))
    seen: list[list[str]] = []

    def process(words: list[str], log: Any, lock: Any, look: Any) -> int:
        seen.append(words[2:])
        assert spreading.make_part(run).state == "elsewhere", "while it is going, nobody else begins it"
        log.write("error: because\n")
        log.flush()
        return 2

    monkeypatch.setattr(spreading, "run_process", process)
    outcome = spreading.make_part(run)
    assert (outcome.name, outcome.state, outcome.reason) == ("part-2-of-3", "failed", "status 2: error: because")
    assert seen == [["test", "--part", "2/3"]] and "because" in (tmp_path / "part-2-of-3.txt").read_text()


def test_interrupting_ends_all_parts(tmp_path: Path) -> None:
    """The threads that wait for them are told; Ctrl-C reaches the main thread alone."""
    ended: list[int] = []

    def part(run: spreading.PartRun, watch: Any) -> Outcome:
        if run.number == 1:
            return Outcome(run.name, "finished")
        try:
            while True:
                watch(0)
                time.sleep(0.01)
        finally:
            ended.append(run.number)

    runs = [spreading.PartRun(n, 3, tmp_path, ()) for n in (1, 2, 3)]
    outcomes = spreading.at_once(runs, {}, tmp_path, lambda run: lambda steps: None, part)
    assert next(outcomes).name == "part-1-of-3"
    with pytest.raises(KeyboardInterrupt):
        outcomes.throw(KeyboardInterrupt)
    assert sorted(ended) == [2, 3]
