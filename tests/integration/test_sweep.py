"""Sweeps as a user runs them: planned, interrupted, gone on with, reported."""

import fcntl
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoTokenizer

from lightning_memlong.cli.main import main as train
from lightning_memlong.errors import UserError
from lightning_memlong.sweep import execute as execution
from lightning_memlong.sweep.command import main, read
from lightning_memlong.sweep.launchers import LAUNCHERS
from lightning_memlong.sweep.plan import Plan
from lightning_memlong.sweep.report import make_report, write_report
from lightning_memlong.sweep.resolve import tokens_a_step
from lightning_memlong.sweep.trials import make_axis_value
from tests.conftest import tiny_llama
from tests.integration.helpers import ROOT, tiny

SHIPPED = sorted((ROOT / "conf" / "sweeps").glob("*.yaml"))
AT_ONCE = ("search", "policy")
"""Those that are tried in the short suite."""


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every run, and where they go; what was typed wins over them."""
    monkeypatch.chdir(ROOT)
    small = tiny(tiny_backbone, text_folder, tmp_path)[2:]
    at = small.index("--trainer.logger.save_dir")
    small = [*small[:at], *small[at + 2 :], "--validate_first", "false"]
    at = small.index("--memory.top_k")
    small = [*small[:at], *small[at + 2 :]]
    small[small.index("--memory.capacity") + 1] = "512"  # room for the 32 chunks that some sweeps read
    return ["--output", str(tmp_path / "sweeps"), *small]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are made in this process, which is faster; the commands they were made with."""
    made: list[list[str]] = []

    def process(words: list[str], log: Any, lock: Any, look: Callable[[], Any]) -> int:
        made.append(words[2:])
        look()
        return train(words[2:])

    monkeypatch.setattr(execution, "run_process", process)
    return made


def write(folder: Path, **sweep: Any) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"seeds": [0], **sweep}, sort_keys=False))
    return str(file)


def columns(folder: Path) -> set[str]:
    """Of TensorBoard's HParams tab, which one folder alone must say."""
    found = []
    for file in folder.rglob("events*"):
        metadata = EventAccumulator(str(file)).Reload().summary_metadata.get("_hparams_/experiment")
        if metadata is not None:
            found.append(HParamsPluginData.FromString(metadata.plugin_data.content).experiment)
    assert len(found) == 1
    return {info.name for info in found[0].hparam_infos}


def plan_of(*arguments: str) -> Plan:
    return Plan(*read(list(arguments))[:3])


# ---- planning ---------------------------------------------------------------------------------------------


def test_a_dry_run_prints_commands_that_hold_what_differs(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, grid={"memory.top_k": [1, 2], "memory.policy": ["fifo", "lru"]}, seeds=[3, 4])
    at = options.index("--trainer.max_steps")
    assert main([file, "--dry_run", "--tokens", "640", *options[:at], *options[at + 2 :]]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert len(commands) == (1 + 4) * 2 and not (tmp_path / "sweeps").exists()
    named = {c[c.index("--trainer.logger.version") + 1]: c for c in commands}
    command = named["top_k=2,policy=fifo,seed=4"]
    given = dict(zip(command[:-1], command[1:], strict=True))
    assert (given["--memory.top_k"], given["--memory.policy"], given["--seed_everything"]) == ("2", "fifo", "4")
    assert given["--trainer.max_steps"] == str(640 // 64) and command[1].endswith("train.py")


def test_cells_with_the_same_settings_are_one(options: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, axes={"memory.top_k": [16, 1], "memory.policy": ["fifo", "retrieval_frequency"]})
    plan = plan_of(file, *options)
    assert [trial.name for trial in plan.trials] == ["baseline", "top_k=1", "policy=fifo"]
    on_axis = {(point.axis, point.value): point.trial.name for point in plan.points}
    assert on_axis["memory.top_k", 16] == on_axis["memory.policy", "retrieval_frequency"] == "baseline"


@pytest.mark.parametrize(
    "file",
    [file if file.stem in AT_ONCE else pytest.param(file, marks=pytest.mark.long) for file in SHIPPED],
    ids=[file.stem for file in SHIPPED],
)
def test_every_shipped_sweep_is_planned_and_takes_a_step(
    file: Path, text_folder: Path, tiny_backbone: Path, tmp_path: Path, in_process: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(file.read_text())
    assert set(content) <= {"baseline", "axes", "grid", "search", "seeds"}, "a sweep holds only what differs"
    deep = tmp_path / "deep"
    tiny_llama(num_hidden_layers=30, max_position_embeddings=1024).save_pretrained(deep)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(deep)
    run = {"model.backbone": deep, "data.path": text_folder, "data.min_document_tokens": 64,
           "data.validation_fraction": 0.2, "trainer.accelerator": "cpu", "trainer.max_steps": 1,
           "trainer.limit_val_batches": 1, "validate_first": "false", "memory.retriever.name": "hashing"}  # fmt: skip
    if file.stem == "retriever":
        run.pop("memory.retriever.name")
    args = [word for key, value in run.items() for word in (f"--{key}", str(value))]
    plan = plan_of(str(file), "--output", str(tmp_path / "sweeps"), "--seeds", "[0]", *args)
    if plan.sweep.search.space:
        assert main([str(file), "--output", str(tmp_path / "sweeps"), "--search.trials", "1", *args]) == 0
        return
    assert len(plan.trials) >= 2
    assert execution.execute(plan.runs()[-1]).state == "finished"


# ---- running ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_sweep_goes_on_past_a_failure_and_tries_only_that_again_as_a_job_array(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "my_policies.py"
    mine.write_text("raise ImportError('not yet')\n")
    file = write(tmp_path, axes={"memory.policy": ["my_policies.oldest"]})
    words = [sys.executable, "-m", "lightning_memlong.sweep", file, *options]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    first = subprocess.run(words, capture_output=True, text=True, env=env)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "finished  baseline,seed=0" in first.stdout and "failed  policy=my_policies.oldest" in first.stdout
    assert (
        "memory.policy='my_policies.oldest' is unknown" in first.stdout and "1 of 2 runs are not done" in first.stdout
    )
    folder = tmp_path / "sweeps" / "mine"
    before = (folder / "baseline,seed=0" / "results.json").stat().st_mtime_ns
    mine.write_text("import torch\ndef oldest(counters): return torch.tensor([0, 1, 2, 3])\n")
    words += ["--launcher", "slurm", "--launcher_args", "{cluster: local, timeout_min: 5}"]
    second = subprocess.run(words, capture_output=True, text=True, env=env)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 of them finished already" in second.stdout
    assert (folder / "baseline,seed=0" / "results.json").stat().st_mtime_ns == before
    for name in ("report.md", "report.csv", "report-memory.policy.png", "policy=my_policies.oldest,seed=0/metrics.csv"):
        assert (folder / name).exists(), name
    assert len(list(folder.glob("events*"))) == 1


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    options: list[str], tmp_path: Path, in_process: list[list[str]]
) -> None:
    file = write(tmp_path, cells=[{"memory.top_k": 1}])
    assert main([file, *options]) == 0 and len(in_process) == 2
    assert columns(tmp_path / "sweeps" / "mine") == {"seed_everything", "memory.top_k"}
    run = tmp_path / "sweeps" / "mine" / "top_k=1,seed=0"
    finished = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    assert main([file, *options]) == 0 and len(in_process) == 3, "what is finished is not made again"
    assert in_process[-1][-2:] == ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert json.loads((run / "results.json").read_text())["after"] == finished["after"]


def test_a_run_that_another_process_is_at_is_left_alone(
    options: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, cells=[{"memory.top_k": 1}])
    folder = tmp_path / "sweeps" / "mine" / "top_k=1,seed=0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([file, *options]) == 1
    assert len(in_process) == 1 and "another process is at it" in capsys.readouterr().out


def test_runs_share_the_cache_of_tokens(options: list[str], tmp_path: Path, in_process: list[list[str]],
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main([write(tmp_path, cells=[{"memory.top_k": 1}, {"memory.top_k": 2}]), *options]) == 0
    assert capsys.readouterr().out.count("Tokens are kept in") <= 1


@pytest.mark.long
def test_runs_on_a_ray_cluster(options: list[str], tmp_path: Path) -> None:
    cut = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
    run = plan_of(write(tmp_path, cells=[{"memory.top_k": 1}]), *options, *cut).runs()[1]
    outcomes = list(LAUNCHERS["ray"]([run], {"num_cpus": 1}, tmp_path, lambda run: lambda steps: None))
    assert [o.state for o in outcomes] == ["finished"] and (run.folder / "results.json").exists()


def test_a_search_goes_on_and_names_the_best(
    options: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"memory.top_k": [1, 2, 3], "model.optimizer.init_args.lr": {"low": 1e-4, "high": 0.1, "log": True}}
    file = write(tmp_path, search={"trials": 2, "space": space})
    at = options.index("--model.optimizer.lr")
    options = [*options[:at], *options[at + 2 :], "--trainer.limit_val_batches", "2"]
    assert main([file, *options]) == 0 and len(in_process) == 2
    assert main([file, *options, "--search.trials", "3"]) == 0 and len(in_process) == 3
    found = [json.loads(f.read_text())["after"]["perplexity"]
             for f in (tmp_path / "sweeps" / "mine").glob("*/results.json")]  # fmt: skip
    said = capsys.readouterr().out.replace("\n", " ")
    assert len(found) == 3 and f"best {min(found):.3f}" in said and "3 of 3 runs have finished" in said


# ---- reporting --------------------------------------------------------------------------------------------


def test_the_report_pairs_seeds(options: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, axes={"memory.top_k": [1, 16]}, cells=[{"memory.query": "current"}], seeds=[0, 1])
    plan = plan_of(file, *options)
    found = {("baseline", 0): 10.0, ("baseline", 1): 20.0, ("top_k=1", 0): 11.0, ("top_k=1", 1): 21.0,
             ("query=current", 0): 5.0}  # fmt: skip
    for run in plan.runs():
        run.folder.mkdir(parents=True)
        if (run.trial.name, run.seed) in found:
            measured = {"perplexity": found[run.trial.name, run.seed], "perplexity_memory_off": 40.0}
            (run.folder / "results.json").write_text(json.dumps({"after": measured}))
            (run.folder / "sweep.json").write_text(json.dumps(run.settings, default=str))
            (run.folder / "run.json").write_text(json.dumps({"git_commit": f"commit {run.seed}"}))
            execution.check_folder(run)
    report = make_report(plan)
    one, base = report.tables["memory.top_k"]
    assert base[""] == "16 (baseline)" and base["perplexity"] == "15.000 ± 7.071" and base["change [%]"] == ""
    assert one["change [%]"] == "+7.50 ± 3.54" and one["better"] == "0 of 2" and one["memory off"] == "40.000 ± 0.000"
    leaking = report.tables["cells"][1]
    assert leaking[""].endswith("(LEAKS)") and leaking["runs"] == "1 of 2" and leaking["change [%]"] == "-50.00"
    assert set(report.figures) == {"memory.top_k", "cells"}
    assert [row["state"] for row in report.data].count("finished") == 5
    assert any("several versions" in note for note in report.notes) and any("LEAKS" in note for note in report.notes)


def test_a_report_comes_whatever_single_runs_did(options: list[str], tmp_path: Path) -> None:
    file = write(tmp_path, axes={"my axis": [{"memory.top_k": 1}, {"memory.top_k": 2}]}, seeds=[0, 1])
    plan = plan_of(file, *options)
    found = {"baseline": (10.0, math.nan), "top_k=1": (math.nan, math.nan), "top_k=2": (math.inf, 12.0)}
    for run in plan.runs():
        run.folder.mkdir(parents=True)
        measured = {"perplexity": found[run.trial.name][run.seed]}
        (run.folder / "results.json").write_text(json.dumps({"after": measured}))
        (run.folder / "sweep.json").write_text(json.dumps(run.settings, default=str))
        (run.folder / "run.json").write_text(json.dumps({"git_commit": "commit"}))
    write_report(plan)
    text = (plan.folder / "report.md").read_text()
    assert "10.000 (1 nan)" in text and "| nan |" in text and "12.000 (1 nan)" in text
    (picture,) = re.findall(r"!\[my axis\]\((.*)\)", text)
    assert picture == "report-my%20axis.png" and (plan.folder / unquote(picture)).is_file()


def test_runs_on_other_text_are_told(options: list[str], tmp_path: Path) -> None:
    plan = plan_of(write(tmp_path, cells=[{"memory.top_k": 1}, {"memory.top_k": 2}]), *options)
    texts = {"baseline": {"train": "a", "validation": "v"}, "top_k=1": {}, "top_k=2": {"train": "a", "validation": "v"}}
    for changed in (False, True):
        for age, run in enumerate(plan.runs()):
            run.folder.mkdir(parents=True, exist_ok=True)
            file = run.folder / "results.json"
            text = texts[run.trial.name] | ({"validation": "w"} if changed and run.trial.name == "top_k=2" else {})
            file.write_text(json.dumps({"texts": text, "after": {"perplexity": 1.0}}))
            os.utime(file, (age, age))
            (run.folder / "sweep.json").write_text(json.dumps(run.settings, default=str))
            (run.folder / "run.json").write_text(json.dumps({"git_commit": "commit"}))
        told = [note for note in make_report(plan).notes if "NOT COMPARABLE" in note]
        assert ([*told] != []) == changed and all("since baseline,seed=0 ran" in note for note in told), told


@pytest.mark.parametrize(
    ("devices", "nodes", "processes"), [("2", 1, 2), (2, 3, 6), ([0, 1], 1, 2), ("0,1,2", 1, 3), ("1", "2", 2)]
)
def test_tokens_are_those_of_all_processes(devices: Any, nodes: Any, processes: int) -> None:
    data = {"stride": None, "window": 64, "batch_size": 2}
    settings = {f"data.init_args.{name}": value for name, value in data.items()}
    settings |= {"trainer.devices": devices, "trainer.num_nodes": nodes, "trainer.accumulate_grad_batches": 4}
    assert tokens_a_step(settings) == 64 * 2 * 4 * processes
    for unknown in ("auto", -1, "-1"):
        with pytest.raises(UserError, match="trainer.devices=.*a number of devices, beside tokens"):
            tokens_a_step(settings | {"trainer.devices": unknown})


@pytest.mark.parametrize("text", [None, "", "epoch,step\n", "epoch,step\n0", "epoch\n0\n", "epoch,step\n0,4\n0,\n"])
def test_watching_a_run_that_is_writing_ends_nothing(text: str | None, options: list[str], tmp_path: Path) -> None:
    (run,) = plan_of(write(tmp_path, cells=[{}]), *options).runs()
    run.folder.mkdir(parents=True)
    if text is not None:
        (run.folder / "metrics.csv").write_text(text)
    assert execution._steps(run) == 0
    (run.folder / "metrics.csv").write_text("epoch,step\n0,4\n")
    assert execution._steps(run) == 5


def test_names_keep_what_tells_values_apart() -> None:
    names = [make_axis_value("model.optimizer.lr", value).label for value in (1e30, 1e-30)]
    assert names == ["lr=1e+30", "lr=1e-30"]


def test_a_run_that_was_killed_says_by_what(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Total FLOPs: 0\n")
    assert execution.last_words(log, 0, -9) == "killed (SIGKILL)"
    log.write_text("error: because\nTotal FLOPs: 0\n")
    assert execution.last_words(log, 0, 2) == "status 2: error: because"


# ---- mistakes ---------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ({"axs": {"memory.top_k": [1]}}, [], ["axes"]),
    "unknown option": ({"axes": {"memory.topk": [1]}}, [], ["cell topk=1", "memory.top_k"]),
    "impossible value": ({"axes": {"memory.top_k": [4000]}}, [], ["cell top_k=4000", "memory.capacity"]),
    "nothing to do": ({"tokens": 100}, [], ["axes", "search"]),
    "tokens and steps": ({"axes": {"memory.top_k": [1]}, "tokens": 9, "overrides": {"trainer.max_steps": 3}}, [],
                         ["tokens", "max_steps"]),
    "an axis that is typed": ({"axes": {"memory.top_k": [1]}}, ["--memory.top_k", "2"],
                              ["memory.top_k", "what the sweep does not vary", "the file of mine"]),
    "an option of a mapping that is typed": ({"axes": {"size": [{"memory.top_k": 1}]}}, ["--memory.top_k=2"],
                                             ["memory.top_k", "what the sweep does not vary"]),
    "a seed that is typed": ({"axes": {"memory.top_k": [1]}}, ["--seed_everything", "3"], ["what seeds of the sweep"]),
    "a seed as an axis": ({"axes": {"seed_everything": [1, 2]}}, [], ["what seeds of the sweep"]),
    "typed steps beside tokens": ({"axes": {"memory.top_k": [1]}, "tokens": 999}, ["--trainer.max_steps", "3"],
                                  ["trainer.max_steps", "what tokens of the sweep"]),
    "a typed folder": ({"axes": {"memory.top_k": [1]}}, ["--trainer.logger.save_dir", "x"], ["what output of the"]),
    "an axis that YAML reads as true": ({"axes": {True: [1]}}, [], ["axes=True", "in quotes"]),
    "text that is not there": ({"axes": {"memory.top_k": [1]}}, ["--data.path", "/nowhere"],
                               ["cell baseline: data.path='/nowhere'"]),
    "a mapping as a value": ({"axes": {"model.tuning": [{"mode": "lora"}]}}, [], ["cell mode=lora"]),
    "a file that is not there": ({"cells": ["nowhere.yaml"]}, [], ["nowhere.yaml"]),
    "same seeds": ({"cells": [{"memory.top_k": 1}], "seeds": [0, 0]}, [], ["seeds"]),
    "a search without space": ({"search": {"trials": 3}}, [], ["axes", "search.space"]),
    "a range upside down": ({"search": {"space": {"memory.top_k": {"low": 8, "high": 1}}}}, [], ["space.memory.top_k"]),
    "a range of words": ({"search": {"space": {"memory.top_k": {"low": "one", "high": 2}}}}, [], ["numbers low and"]),
    "a step beside log": ({"search": {"space": {"memory.top_k": {"low": 1, "high": 9, "log": True, "step": 2}}}}, [],
                          ["space.memory.top_k"]),
    "tokens on who knows how many": ({"axes": {"memory.top_k": [1]}, "tokens": 999,
                                      "overrides": {"trainer.devices": "auto"}}, [], ["trainer.devices='auto'"]),
}  # fmt: skip


@pytest.mark.parametrize(("sweep", "more", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_anything_runs(
    sweep: dict[str, Any], more: list[str], told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    try:
        status = main([write(tmp_path, **sweep), "--output", str(tmp_path / "sweeps"), *more])
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2 and not (tmp_path / "sweeps").exists()
    assert all(word in message for word in told) and "Traceback" not in message, message


def test_a_folder_of_other_settings_is_refused(
    options: list[str], tmp_path: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, cells=[{"memory.top_k": 1}])
    assert main([file, *options]) == 0
    assert main([file, *options, "--model.optimizer.lr", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "model.optimizer.init_args.lr: 0.01 there, 0.5 here" in message and "--name" in message


def test_no_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry_run"]) == 2 and "sweeps/top_k.yaml" in capsys.readouterr().err
    assert main(["conf/sweeps/nothing.yaml"]) == 2
