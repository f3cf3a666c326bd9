"""The short form of ``tests/killing.py``, in a process of its own since it forks."""

import os
import subprocess
import sys

import pytest

from tests.integration.helpers import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("what, times", [("fit", 3), ("predict", 4), ("sweep", 2), ("full_disk", 1)])
def test_nothing_half_written_is_taken_for_whole(what: str, times: int) -> None:
    command = [sys.executable, "-m", "tests.killing", "--times", str(times), "--only", what]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads of a pool do not survive a fork
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all went on" in done.stdout or "left out" in done.stdout
