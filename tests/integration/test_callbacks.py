"""Lightning's callbacks, each added to the shipped configuration: they work, or are refused by name."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import yaml

from lightning_memlong.cli.main import main
from tests.integration.helpers import tiny

HERE = "tests.integration.test_callbacks"
OF_CALLBACK = "--trainer.callbacks."
BASES = ["BasePredictionWriter", "Callback", "Checkpoint"]
ELSEWHERE = ["EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging"]
"""Tried in test_averaging.py (WeightAveraging is the base of EMAWeightAveraging)."""
WORKS: dict[str, list[str]] = {
    "DeviceStatsMonitor": ["cpu_stats", "true"],
    "EarlyStopping": ["monitor", "val/loss"],
    "GradientAccumulationScheduler": ["scheduling", "{0: 2}"],
    "LambdaCallback": ["on_train_start", f"{HERE}.hello"],
    "LearningRateMonitor": [],
    "ModelCheckpoint": ["monitor", "val/perplexity", "save_top_k", "2"],
    "ModelSummary": ["max_depth", "2"],
    "OnExceptionCheckpoint": ["dirpath", "{tmp}"],
    "RichModelSummary": [],
    "RichProgressBar": [],
    "SpikeDetection": [],
    "ThroughputMonitor": ["batch_size_fn", f"{HERE}.rows", "window_size", "2"],
    "TQDMProgressBar": [],
    "Timer": ["duration", "00:01:00:00"],
}
REFUSED: dict[str, tuple[list[str], str]] = {
    "BackboneFinetuning": ([], "model.memory_layer.*model.tuning"),
    "BaseFinetuning": ([], "a class of your own"),
    "BatchSizeFinder": ([], "rows.*--data.batch_size"),
    "LearningRateFinder": ([], "optimiser's.*conf/sweeps"),
    "ModelPruning": (["pruning_fn", "l1_unstructured"], "other parameters.*exported folder"),
    "ProgressBar": ([], "Given value: ProgressBar"),
}


class Thing:
    """What no file can say."""


class Holding(L.Callback):
    """As a person's own callback may be."""

    def __init__(self, thing: Any = Thing(), size: int = 2) -> None:  # noqa: B008
        assert isinstance(thing, Thing) and size == 3


def hello(trainer: L.Trainer, pl_module: Any) -> None:
    print("hello from a function")


def rows(batch: Any) -> int:
    return len(batch["input_ids"])


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    short = ["--validate_first", "false", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    return [*tiny(tiny_backbone, text_folder, tmp_path), *short, "--trainer.limit_val_batches", "1"]


def adding(name: str, settings: list[str], folder: Path) -> list[str]:
    pairs = zip(settings[::2], settings[1::2], strict=True)
    typed = [word for key, value in pairs for word in (OF_CALLBACK + key, value.replace("{tmp}", str(folder)))]
    return [f"--trainer.callbacks+={name}", *typed]


def test_every_callback_of_lightning_is_in_one_of_the_tables() -> None:
    known = sorted([*BASES, *ELSEWHERE, *WORKS, *REFUSED])
    assert known == sorted(lightning_callbacks.__all__)


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options, *adding(name, WORKS[name], tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "after training" in said
    assert ("left out ProgressBar" in said) == (name in ("RichProgressBar", "TQDMProgressBar"))
    assert ("hello from a function" in said) == (name == "LambdaCallback")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(
    name: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, words = REFUSED[name]
    try:
        status = main(["fit", *options, *adding(name, settings, tmp_path)])
    except SystemExit as stop:  # the parser's own
        status = stop.code  # type: ignore[assignment]
    told = capsys.readouterr().err
    assert status == 2 and name in told and re.search(words, told) and "Traceback" not in told
    assert not list(tmp_path.rglob("version_0")), "nothing is written"


@pytest.mark.filterwarnings("ignore:.*Unable to serialize.*")
def test_an_object_that_no_file_can_say_is_named_and_there_again(options: list[str], tmp_path: Path) -> None:
    assert main(["fit", *options, *adding(f"{HERE}.Holding", ["size", "3"], tmp_path)]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert "# not written: thing, tests.integration.test_callbacks.Thing object\n" in saved.read_text()
    assert yaml.safe_load(saved.read_text())["trainer"]["callbacks"][-1]["init_args"] == {"size": 3}
    again = ["--trainer.max_steps", "3", "--ckpt_path", "last"]
    assert main(["fit", "--config", str(saved), *again]) == 0


def test_a_member_of_an_enumeration_is_written_as_its_value(options: list[str], tmp_path: Path) -> None:
    assert main(["fit", *options, *adding("Timer", ["duration", "00:01:00:00", "interval", "epoch"], tmp_path)]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["callbacks"][-1]["init_args"]["interval"] == "epoch"
