"""Lightning's switches, tried on the shipped configuration."""

from pathlib import Path

import pytest

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
