"""The entry points answer at once what needs nothing loaded, and find everything else."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_memlong import __main__ as entry
from lightning_memlong.cli import MemLongCLI
from tests.integration.helpers import ROOT

AGAIN = [sys.executable, "-X", "importtime"]
PROGRAMS = {"python train.py": ["train.py"], "python -m lightning_memlong": ["-m", "lightning_memlong"]}


def test_it_knows_the_subcommands_there_are() -> None:
    assert {*entry.SUBCOMMANDS, "chat"} == {*MemLongCLI.NAMES} and "chat" in entry.PROGRAMS
    assert all(callable(importlib.import_module(module).main) for module, _ in entry.PROGRAMS.values())


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        ([], 2, "subcommands"),
        (["--help"], 0, "validate"),
        (["--version"], 0, "\n"),
        (["fti"], 2, "did you mean fit?"),
        (["x"], 2, "--help"),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_loaded_for_it(program: str, arguments: list[str], status: int, words: str) -> None:
    command = [*AGAIN, *PROGRAMS[program], *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert program in done.stdout + done.stderr or words not in ("subcommands", "--help")
    assert not {"torch", "lightning"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    "arguments", [["fit", "--config", "x.yaml"], ["--config", "x.yaml", "fit"], ["test", "--help"], ["sweep"]]
)
def test_everything_else_is_the_command_lines(arguments: list[str]) -> None:
    assert entry.answered_at_once(arguments) is None


def test_an_unknown_yaml_is_told_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for program, option in (("fit", "config"), ("sweep", "file")):
        given = [program, f"--{option}", "top_k.yaml"]
        assert entry.main(given) == 2
        told = capfd.readouterr().err
        assert told.startswith(f"error: {option}='top_k.yaml'") and told.count("\n") == 1
        assert "eval/recall.yaml" in told and told.endswith("did you mean sweeps/top_k.yaml?\n")


def test_a_package_of_ones_own_with_a_name_of_ours_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(["validate", "--config", "memlong.yaml", "--trainer.callbacks+=callbacks.my.Mine"])
    assert stop.value.code == 2
    told = capfd.readouterr().err
    assert "There is no callbacks.my, and here callbacks is the project's. Fix: " in told and "another one." in told


def test_an_extra_that_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "lightning_memlong.lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert entry.main(["lm-eval", "--help"]) == 2
    assert "lm-eval is not installed" in (told := capfd.readouterr().err) and told.count("\n") == 1
