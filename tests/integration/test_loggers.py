"""Loggers other than TensorBoard's: numbers, figures, texts and settings arrive, and a run is found and goes on."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CometLogger
from matplotlib.figure import Figure

from lightning_memlong.cli.main import main
from lightning_memlong.training.loggers import note_settings_of_run, show_anything, show_figure, show_text
from tests.integration.helpers import tiny

FIGURES = {"retrieval/map", "attention/memory_mass", "attention/memory_bias", "attention/memory_scale"}
TEXTS = {"memory/window_that_gained_most", "memory/window_that_lost_most"}
LOGGERS = {
    "WandbLogger": ["offline", "true", "save_dir", "runs"],
    "MLFlowLogger": ["tracking_uri", "sqlite:///mlflow.db"],
    "CSVLogger": ["save_dir", "runs"],
}


@pytest.fixture
def run(
    request: pytest.FixtureRequest, tiny_backbone: Path, text_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[list[str]]:  # fmt: skip
    """Options of a run with one of the loggers, begun in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    options = tiny(tiny_backbone, text_folder, tmp_path / "not used")
    for option in ("--trainer.logger.save_dir", "--trainer.callbacks.figures"):
        at = options.index(option)
        del options[at : at + 2]
    given = LOGGERS[request.param]
    typed = [w for k, v in zip(given[::2], given[1::2], strict=True) for w in (f"--trainer.logger.{k}", v)]
    yield [*options, "--trainer.logger", request.param, *typed, "--trainer.limit_val_batches", "3"]
    if request.param == "WandbLogger":
        import wandb

        wandb.finish()


def kept(logger: str, folder: Path) -> tuple[set[str], set[str], dict[str, Any]]:
    """Names of figures and of texts, and settings, where a logger keeps them."""
    if logger == "MLFlowLogger":
        from mlflow.tracking import MlflowClient

        client = MlflowClient("sqlite:///mlflow.db")
        (made,) = client.search_runs(["1"])
        assert "val/perplexity" in made.data.metrics, "numbers"
        files = {str(f.relative_to(g)) for g in Path("mlruns").rglob("artifacts") for f in g.rglob("*.*")}
        settings = dict(made.data.params)
    elif logger == "WandbLogger":
        media = next(Path("runs/wandb").glob("offline-run-*/files/media"))
        files = {f"{f.relative_to(media / 'images')}" for f in (media / "images").rglob("*.png")}
        files |= {f"{f.relative_to(media / 'table')}" for f in (media / "table").rglob("*.json")}
        files = {f"{f.rpartition('_')[0].rpartition('_')[0]}/x{Path(f).suffix}" for f in files}
        import wandb

        assert wandb.run is not None and "val/perplexity" in dict(wandb.run.summary), "numbers"
        settings = dict(wandb.run.config)
    else:
        files = {str(f.relative_to(folder / "figures")) for f in (folder / "figures").rglob("*.*")}
        settings = {line.partition(": ")[0]: line.partition(": ")[2] for line in open(folder / "hparams.yaml")}
    figures = {str(Path(f).parent) for f in files if f.endswith(".png")}
    return figures, {str(Path(f).parent) for f in files} - figures, settings


@pytest.mark.parametrize("run", LOGGERS, indirect=True)
def test_everything_arrives_and_the_run_goes_on(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logger = run[run.index("--trainer.logger") + 1]
    assert main(["fit", *run]) == 0
    (checkpoint,) = Path().rglob("last.ckpt")
    folder = checkpoint.parents[1]
    files = {"config.yaml", "run.json", "metrics.csv", "results.json"}
    assert files <= {f.name for f in folder.iterdir()}, "one folder a run"
    figures, texts, settings = kept(logger, folder)
    assert figures == FIGURES and texts == TEXTS and str(settings["memory.top_k"]).strip() == "3"
    said = capsys.readouterr().out
    assert f"Run folder: {folder}" in said.replace(f"{Path.cwd()}/", "") and "tensorboard" not in said
    assert main(["fit", *run, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
    assert list(Path().rglob("last.ckpt")) == [checkpoint], "the same run"
    said = capsys.readouterr().out
    assert "before training" in said and "after training" in said
    assert json.loads((folder / "results.json").read_text())["steps"] == 6


@pytest.mark.parametrize("run", ["CSVLogger"], indirect=True)
def test_rows_of_a_run_that_goes_on_are_kept(run: list[str]) -> None:
    assert main(["fit", *run]) == 0
    (file,) = Path().rglob("metrics.csv")
    before = file.read_text().splitlines()
    assert main(["fit", *run, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
    steps = [int(row.split(",")[before[0].split(",").index("step")]) for row in file.read_text().splitlines()[1:]]
    assert min(steps) == 0 and max(steps) >= 5 and steps == sorted(steps)


def test_two_loggers_share_the_folder_of_the_first(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["fit", *tiny(tiny_backbone, text_folder, tmp_path / "runs")]
    options += ["--trainer.logger+=CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "beside")]
    assert main(options) == 0
    assert main([*options, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
    (folder,) = (tmp_path / "runs" / "memlong").iterdir()
    assert (folder / "results.json").is_file() and (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list((tmp_path / "beside").rglob("metrics.csv"))) == 1


class Comet(CometLogger):
    """One without its package, which writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        names = ("log_figure", "log_text")
        self.asked = SimpleNamespace(**{n: partial(self._note, n) for n in names})

    def _note(self, name: str, *given: Any, **named: Any) -> None:
        self.calls.append((name, (given, named)))

    @property
    def experiment(self) -> Any:
        return self.asked

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(("settings", params))


def test_comet_is_given_figures_and_texts_by_its_own_methods() -> None:
    logger, figure = Comet(), Figure()
    assert show_anything([logger]) and not show_anything([object()])
    show_figure([logger, object()], "retrieval/map", figure, 3)
    show_text([logger, object()], "memory/x", "text", 4)
    note_settings_of_run([logger], {"a": 1})
    assert logger.calls == [
        ("log_figure", (("retrieval/map", figure), {"step": 3})),
        ("log_text", (("text",), {"step": 4, "metadata": {"name": "memory/x"}})),
        ("settings", {"a": 1}),
    ]
