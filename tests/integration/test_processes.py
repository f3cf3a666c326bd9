"""Two processes on the CPU train as one with the union of their rows: same windows, same weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.helpers import ROOT, recorded, recording, tiny

pytestmark = pytest.mark.slow
PAPER = ["--model.source", "single", "--model.fusion", "gated", "--model.gradient_checkpointing", "true",
         "--model.tuning.mode", "lora", "--model.tuning.lora_rank", "2", "--model.tuning.lora_dropout", "0",
         "--validate_first", "false"]  # fmt: skip
STRATEGIES = {
    "ddp": ["--trainer.strategy", "ddp"],
    "fsdp": ["--config", str(ROOT / "conf" / "fsdp.yaml")],
}


def fit(args: list[str]) -> None:
    command = [sys.executable, "train.py", "fit", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def saved(runs: Path) -> dict[str, Any]:
    return torch.load(next(runs.rglob("last.ckpt")), weights_only=True)


@pytest.mark.parametrize("loss_weights", ["none", pytest.param("long_context", marks=pytest.mark.long)])
def test_gradients_of_two_processes_are_those_of_one_with_both_rows(
    loss_weights: str, tiny_backbone: Path, text_folder: Path, tmp_path: Path
) -> None:
    def options(name: str) -> list[str]:
        short = ["--trainer.max_steps", "6", "--model.scheduler.total_steps", "6", "--trainer.limit_val_batches", "0",
                 "--model.loss_weights", loss_weights]  # fmt: skip
        return [*tiny(tiny_backbone, text_folder, tmp_path / name), *PAPER, *short]

    fit([*options("one"), *recording(tmp_path / "seen-one"), "--data.batch_size", "2"])
    alone, expected = recorded(tmp_path / "seen-one"), saved(tmp_path / "one")["state_dict"]
    assert len(expected) > 20 and max(w.abs().max() for k, w in expected.items() if "gates" in k) > 0
    for name, strategy in STRATEGIES.items():
        both = [*options(name), *strategy, "--trainer.devices", "2"]
        if name == "fsdp":  # whose weights and optimiser states are put together in a checkpoint and shared out again
            fit([*both, "--trainer.max_steps", "4"])
            fit([*both, "--ckpt_path", "last"])
        else:
            fit([*both, *recording(tmp_path / f"seen-{name}")])
            each = [recorded(tmp_path / f"seen-{name}", rank) for rank in (0, 1)]
            for step, first, second in zip(alone, *each, strict=True):
                assert step["sum"] == first["sum"] + second["sum"], "the same windows"
        found = saved(tmp_path / name)
        assert found["state_dict"].keys() == expected.keys() and found["global_step"] == 6
        for key, weight in expected.items():
            torch.testing.assert_close(found["state_dict"][key], weight, atol=1e-6, rtol=1e-5, msg=f"{name}: {key}")
        banks = found["callbacks"]["MemoryBankCallback"]["banks"]
        assert len(banks) == 2, "a bank each"


@pytest.mark.long
def test_tensor_parallelism_is_refused(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> None:
    options = tiny(tiny_backbone, text_folder, tmp_path / "runs")
    command = [sys.executable, "train.py", "fit", *options, *STRATEGIES["fsdp"], "--trainer.devices", "2"]
    command += ["--trainer.strategy.data_parallel_size", "1", "--trainer.strategy.tensor_parallel_size", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "trainer.strategy.tensor_parallel_size=2" in done.stderr
    assert "data_parallel_size: 2" in done.stderr
