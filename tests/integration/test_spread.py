"""An evaluation in parts gives what one run gives, however it is spread."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_memlong.cli.main import main
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
    assert "Part 2-of-2: 1 of 3 measured. 8 of 24 measurements are made" in told and "on / off" not in told
    # Two documents side by side are still those of the part.
    assert main([*options, "--part", "1/2", "--data.batch_size", "2"]) == 0
    parts = measured(tmp_path / "parts")
    assert sorted(len(lines) for lines in parts.values()) == [8, 16] and all("part-" in name for name in parts)
    assert not list((tmp_path / "parts").rglob("perplexity.md")), "no part reports"
    assert main([*options, "--part", "4/4"]) == 0
    assert "Part 4-of-4: nothing to measure: there are 3 to share out" in capsys.readouterr().out
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
    """Here, more parts than documents; then as a job array, after one part was lost and another fails."""
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
    files[2].chmod(0o444)
    assert spread([*slurm, *options]) == 0
    assert rows(tmp_path / "runs") == before and [len(f.read_text().splitlines()) for f in files] == [8, 8, 8]
    log = folder / "part-2-of-3.txt"
    assert "16 measurements found, the rest goes on" in log.read_text()
    assert spread(["--parts", "2", *options, "--evaluation.lengths", "[60]"]) == 2, "told before any part starts"
    assert "multiples of memory.chunk_size" in capfd.readouterr().err


@pytest.mark.long
def test_a_failed_part_stops_no_other(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = grid(tiny_backbone, text_folder, tmp_path / "runs")
    assert main([*options, "--part", "1/3"]) == 0
    (first,) = (tmp_path / "runs").rglob("*.jsonl")
    (first.parent / first.name.replace("1-of-3", "2-of-3")).mkdir()  # nobody can write a record there
    assert spread(["--parts", "3", *options]) == 1
    told = capfd.readouterr().out
    assert "failed  part-2-of-3" in told and "1 of 3 parts are not done" in told and "finished  part-3-of-3" in told
    assert len(rows(tmp_path / "runs")) == 16
