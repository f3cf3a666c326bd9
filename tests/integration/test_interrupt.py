"""Ctrl-C in training: the step ends, it is saved, and the run goes on from there to the same end."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_memlong.cli.main import main
from tests.integration.helpers import differences, tiny


class PressesCtrlC(L.Callback):
    """While a batch is being computed."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.times:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            self.times = 0


PRESS = "--trainer.callbacks+=tests.integration.test_interrupt.PressesCtrlC"


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    more = ["--validate_first", "false", "--trainer.limit_val_batches", "2", "--trainer.accumulate_grad_batches", "2"]
    return ["fit", *tiny(tiny_backbone, text_folder, tmp_path), *more, "--trainer.max_steps", "5"]


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "memlong" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)


def test_ctrl_c_saves_the_step_and_the_run_goes_on_to_the_same_end(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole, stopped = (["--trainer.logger.save_dir", str(tmp_path / name)] for name in ("whole", "stopped"))
    assert main([*options, *whole]) == 0
    assert main([*options, *stopped, PRESS, "--trainer.callbacks.step", "2"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Interrupted after step 3, which is saved" in capsys.readouterr().out
    assert saved(tmp_path / "stopped")["global_step"] == 3
    assert main([*options, *stopped, "--ckpt_path", "last"]) == 0
    ended = [saved(tmp_path / name) for name in ("whole", "stopped")]
    for part in ("state_dict", "optimizer_states", "global_step", "MemoryBankCallback"):
        found = [state.get(part, state["callbacks"].get(part)) for state in ended]
        assert found[0] is not None and not differences(*found), part


def test_ctrl_c_twice_stops_at_once(options: list[str], tmp_path: Path) -> None:
    assert main([*options, PRESS, "--trainer.callbacks.step", "2", "--trainer.callbacks.times", "2"]) == 130
    assert not list(tmp_path.rglob("last.ckpt"))
