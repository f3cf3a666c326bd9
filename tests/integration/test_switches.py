"""Lightning's switches, tried on the shipped configuration."""

import re
from pathlib import Path

import lightning as L
import pytest

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.cli.main import main
from tests.integration.helpers import tiny


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return ["fit", *tiny(tiny_backbone, text_folder, tmp_path / "runs"), "--trainer.default_root_dir", str(tmp_path)]


SWITCHES = {
    "logger": (["false"], "LearningRateMonitor"),
    "barebones": (["true"], "ProgressBar, LearningRateMonitor, LastCheckpoint, logger, profiler"),
    "enable_checkpointing": (["false"], "LastCheckpoint"),
    "enable_progress_bar": (["false"], "ProgressBar"),
    "enable_model_summary": (["false"], ""),
    "fast_dev_run": (["true"], ""),
    "overfit_batches": (["2"], ""),
    "detect_anomaly": (["true"], ""),
    "deterministic": (["true"], ""),
    "inference_mode": (["false"], ""),
    "limit_train_batches": (["2"], ""),
    "num_sanity_val_steps": (["1"], ""),
    "profiler": (["null"], ""),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_works_and_says_what_it_leaves_out(
    switch: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    value, out = SWITCHES[switch]
    assert main([*options, f"--trainer.{switch}", *value]) == 0
    said = capsys.readouterr().out
    assert ("left out" in said) == bool(out) and out in said
    if switch not in ("barebones", "fast_dev_run"):
        assert "after training" in said


def test_a_run_without_a_logger_prints_its_table_and_resumes(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options += ["--trainer.logger", "false"]
    assert main(options) == 0 and (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert main([*options, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
    said = capsys.readouterr().out
    assert said.count("after training") == 2 and "Run folder" not in said
    assert not (tmp_path / "runs").exists() and not (tmp_path / "lightning_logs").exists()


REFUSED = {
    "a share of an epoch that has no length": (
        ["--data.cache", "false", "--trainer.val_check_interval", "0.5"], "val_check_interval.*an int",
    ),
    "nothing for a number": (["--trainer.devices", ""], "devices"),
    "more than an epoch": (
        ["--trainer.val_check_interval", "100000", "--trainer.check_val_every_n_epoch", "1"],
        "val_check_interval.*100000",
    ),
    "a metric that is not there": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/nothing"],
        "val/nothing.*not available",
    ),
    "arguments a callback refuses": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.mode",
         "up"],
        "mode.*up",
    ),
    "arguments a callback of one's own refuses": (
        ["--trainer.callbacks+=tests.integration.test_switches.Refusing"], "test_switches.Refusing refuses.*because",
    ),
    "options that do not go together": (
        ["--trainer.strategy", "ddp_spawn", "--trainer.devices", "0"], "",
    ),
    "a logger without its package": (["--trainer.logger", "CometLogger"], "comet"),
}  # fmt: skip


class Refusing(L.Callback):
    """As a person's own callback may be."""

    def __init__(self) -> None:
        raise ValueError("because of\n  something")


@pytest.mark.parametrize("case", REFUSED)
def test_what_lightning_refuses_is_told_in_one_line(
    case: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, words = REFUSED[case]
    assert main([*options, "--validate_first", "false", *more]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, told) and told.startswith("error: ") and "Fix: " in told, told
    with pytest.raises(Exception, match=""):
        main([*options, "--validate_first", "false", *more, "--debug"])


def test_null_in_a_file_for_what_cannot_be_null_is_told(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed, the parser refuses it; in a file it does not look."""
    (tmp_path / "null.yaml").write_text("trainer: {accumulate_grad_batches: null}\n")
    assert main([*options, "--config", str(tmp_path / "null.yaml")]) == 2
    assert "trainer.accumulate_grad_batches=None" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(MemoryBankCallback, "check", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(options)
