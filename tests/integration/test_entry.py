"""The entry point answers at once what needs nothing loaded."""

import subprocess
import sys

import pytest

import train
from lightning_memlong.cli import MemLongCLI
from tests.integration.helpers import ROOT


def test_it_knows_the_subcommands_there_are() -> None:
    assert tuple(train.SUBCOMMANDS) == MemLongCLI.NAMES


@pytest.mark.parametrize(
    "arguments, status, words",
    [([], 2, "subcommands"), (["--help"], 0, "validate"), (["fti"], 2, "did you mean fit?"), (["x"], 2, "--help")],
)
def test_nothing_is_loaded_for_it(arguments: list[str], status: int, words: str) -> None:
    command = [sys.executable, "-X", "importtime", "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert not {"torch", "lightning"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    "arguments", [["fit", "--config", "x.yaml"], ["--config", "x.yaml", "fit"], ["test", "--help"]]
)
def test_everything_else_is_the_command_lines(arguments: list[str]) -> None:
    assert train.answered_at_once(arguments) is None
