"""Callbacks that average weights: they train, are validated, resumed and exported as averages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memlong import MemLong
from lightning_memlong.cli.main import main
from tests.integration.helpers import differences, tiny
from tests.integration.test_interrupt import PRESS

EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay", "0.5"]
SWA = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "1e-3",
       "--trainer.callbacks.swa_epoch_start", "1", "--trainer.max_epochs", "3", "--trainer.max_steps", "-1",
       "--trainer.limit_train_batches", "3"]  # fmt: skip


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *tiny(tiny_backbone, text_folder, tmp_path),
        "--validate_first",
        "false",
        "--trainer.limit_val_batches",
        "2",
    ]


def saved(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("last.ckpt")
    return torch.load(file, weights_only=True)


def test_an_average_is_resumed_to_the_last_digit_and_exported(options: list[str], tmp_path: Path) -> None:
    whole, parts = (["--trainer.logger.save_dir", str(tmp_path / name)] for name in ("whole", "parts"))
    assert main(["fit", *options, *whole, *EMA, "--trainer.max_steps", "6"]) == 0
    once = ["--trainer.max_steps", "6"]
    halfway = [PRESS, "--trainer.callbacks.step", "2"]
    assert main(["fit", *options, *parts, *EMA, *once, *halfway]) == 130
    half = saved(tmp_path / "parts")
    assert half["global_step"] == 3 and differences(half["state_dict"], half["current_model_state"])
    assert main(["fit", *options, *parts, *EMA, *once, "--ckpt_path", "last"]) == 0
    ended = [saved(tmp_path / name) for name in ("whole", "parts")]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert not differences(*(state[part] for state in ended)), part
    average, current = ended[0]["state_dict"], ended[0]["current_model_state"]
    assert average.keys() == current.keys() and not any("layers.0." in name for name in average), "what is trained"
    assert main(["export", *options, *whole, "--ckpt_path", "last", "--output", str(tmp_path / "out")]) == 0
    exported = MemLong.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[k.removeprefix("model.")], v) for k, v in average.items() if "memory_" not in k)


def test_stochastic_weight_averaging_trains_and_is_validated(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options, *SWA]) == 0
    assert "after training" in capsys.readouterr().out
