"""The short form of ``tests/killing.py``, in a process of its own since it forks."""

import os
import subprocess
import sys

import pytest

from tests.integration.helpers import ROOT

LONG = [("fit", 8), ("predict", 8), ("sweep", 4), ("full_disk", 40)]


@pytest.mark.parametrize(
    "what, times", [("fit", 2), ("full_disk", 1), *(pytest.param(*one, marks=pytest.mark.long) for one in LONG)]
)
@pytest.mark.slow
def test_nothing_half_written_is_taken_for_whole(what: str, times: int) -> None:
    command = [sys.executable, "-m", "tests.killing", "--times", str(times), "--only", what]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of a pool do not survive a fork
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all went on" in done.stdout or "left out" in done.stdout
