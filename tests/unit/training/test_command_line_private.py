"""What we use of Lightning and jsonargparse without their promise is there, and does what we use it for.

Each test is named after the thing, so that a new release that changes it fails here, by name, before anything else.
"""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_memlong.cli.console import ParameterSummary
from lightning_memlong.training.lightning_private import CheckpointAwareCLI, actions, all_actions


class Told(CheckpointAwareCLI):
    """Writes down which hooks are called, in order; nothing is trained."""

    NAMES = ("fit", "test")

    def __init__(self, *argv: str) -> None:
        self.argv, self.told = list(argv), []  # type: ignore[var-annotated]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(BoringModel, save_config_callback=None, seed_everything_default=False, args=self.argv)

    def merge_stored_settings(self) -> None:
        self.told += ["stored settings", hasattr(self, "config"), hasattr(self, "config_init")]

    def instantiate_trainer(self, **options: object) -> L.Trainer:
        self.told.append("trainer")
        return L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False)

    def test(self, **options: object) -> None:
        self.told += ["test", sorted(options)]

    def after_test(self) -> None:
        self.told.append("after test")


def test_parse_ckpt_path_comes_after_parsing_and_before_building() -> None:
    assert callable(LightningCLI._parse_ckpt_path)
    assert Told("test").told[:4] == ["stored settings", True, False, "trainer"]


def test_parse_ckpt_path_is_the_only_thing_that_reads_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "not.ckpt").write_text("no checkpoint")
    assert Told("test", "--ckpt_path", str(tmp_path / "not.ckpt")).told[-1] == "after test"


def test_subcommands_are_asked_of_the_instance() -> None:
    for argv in (["test"], ["fit"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(L.Trainer, "fit", lambda self, **options: None)
            cli = Told(*argv)
        added = [action.choices for action in actions(cli.parser) if isinstance(action.choices, dict)]
        assert [list(choices) for choices in added] == [argv], "only the one asked for is made"


def test_a_method_of_the_cli_runs_before_the_trainers() -> None:
    told = Told("test").told
    assert told[-3] == "test" and told[-1] == "after test"
    assert {"model", "ckpt_path"} <= set(told[-2])


def test_actions_hold_names_help_and_subcommands() -> None:
    parser = Told("test").parser
    names = {action.dest for action in all_actions(parser)}
    assert {"config", "ckpt_path", "trainer.max_steps"} <= names
    (path,) = [action for action in all_actions(parser) if action.dest == "ckpt_path"]
    assert isinstance(path.help, str)


# ---- public, but relied upon in detail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (LightningCLI.parse_arguments, {"parser", "args"}),
        (LightningCLI.instantiate_trainer, {"kwargs"}),
        (SaveConfigCallback.__init__, {"parser", "config", "save_to_log_dir"}),
        (LightningArgumentParser.format_help, {"formatter"}),
        (ModelSummary.summarize, set(inspect.signature(ParameterSummary.summarize).parameters)),
    ],
)
def test_what_we_override_has_the_arguments_we_take(function: Callable[..., object], names: set[str]) -> None:
    assert names <= set(inspect.signature(function).parameters)


def test_lightning_adds_its_own_summary_unless_there_is_one() -> None:
    summaries = [c for c in L.Trainer(logger=False).callbacks if isinstance(c, ModelSummary)]  # type: ignore[attr-defined]
    assert [type(c) for c in summaries] in ([RichModelSummary], [ModelSummary])


def test_the_summary_says_nothing_of_flops(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = L.Trainer(logger=False, max_steps=1, enable_checkpointing=False, enable_progress_bar=False,
                        callbacks=[ParameterSummary()], accelerator="cpu")  # fmt: skip
    ParameterSummary().on_fit_start(trainer, BoringModel())
    shown = capsys.readouterr().out
    assert "FLOPs" not in shown
    assert "layer" in shown and "Linear" in shown and "Trainable params: 66" in shown and "Total params: 66" in shown


def test_file_writer_takes_a_summary(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        assert writer.file_writer is not None
        writer.file_writer.add_summary(hparams({"a": 1}, {"b": 0.0})[0])
