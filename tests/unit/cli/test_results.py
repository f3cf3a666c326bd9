"""``results.json``: written by keys that no heading of a table can change; files of before that are read as well."""

import json
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_memlong.cli.console import show_perplexity
from lightning_memlong.cli.parser import resolved_option, typed_option
from lightning_memlong.cli.results import read_results, read_texts, write_results

METRICS = {"perplexity": 4.0, "perplexity_memory_off": 5.0, "perplexity_ratio": 0.8}


@pytest.mark.parametrize(("subcommand", "key"), [("fit", "after"), ("validate", "metrics"), ("test", "metrics")])
def test_what_is_written_is_read(subcommand: str, key: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    folder = Path(logger.log_dir)
    assert read_results(folder, subcommand) is None
    write_results(trainer, subcommand, {key: METRICS})
    assert read_results(folder, subcommand) == METRICS
    (file,) = folder.glob("results*.json")
    assert json.loads(file.read_text()) == {"steps": 0, "texts": {}, key: METRICS}
    assert read_texts(folder, subcommand) == {}


@pytest.mark.parametrize(("subcommand", "heading"), [("fit", "after training"), ("validate", ""), ("test", "")])
def test_files_with_headings_are_read(subcommand: str, heading: str, tmp_path: Path) -> None:
    name = "results.json" if subcommand == "fit" else f"results_{subcommand}.json"
    (tmp_path / name).write_text(json.dumps({"steps": 4, "before training": {}, heading: METRICS}))
    assert read_results(tmp_path, subcommand) == METRICS


def test_a_single_row_without_a_name_has_no_column_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_perplexity("Title", {"": METRICS}, "memory on", None, None)
    alone = capsys.readouterr().out
    show_perplexity("Title", {"before training": METRICS, "after training": METRICS}, "memory on", None, None)
    named = capsys.readouterr().out
    line = next(line for line in alone.splitlines() if "4.000" in line)
    assert len(line.strip(" │").split("│")) == 3
    assert "before training" in named and all(x in alone and x in named for x in ("memory off", "5.000", "0.800"))


def test_an_option_is_found_as_typed_and_as_resolved() -> None:
    settings = {"data.init_args.window": 1, "memory.top_k": 2, "model.optimizer.init_args.lr": 3}
    keys = {
        "data.window": "data.init_args.window",
        "data.init_args.window": "data.init_args.window",
        "model.optimizer.lr": "model.optimizer.init_args.lr",
        "memory.top_k": "memory.top_k",
        "data.path": "data.path",
    }
    for option, key in keys.items():
        assert resolved_option(option, settings) == key
    assert typed_option("data.init_args.window") == "data.window"
