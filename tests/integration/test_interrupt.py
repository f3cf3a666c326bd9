"""A run that ends early: Ctrl-C saves the step, and what goes on shows what a run in one piece shows."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


class Fails(L.Callback):
    """In the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the lights went out")


def curves(run: Path) -> dict[str, Any]:
    """What is shown of a run: rows of ``metrics.csv`` and TensorBoard's scalars but for what they cost."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("cost/")} for row in csv.DictReader(file)]
    for row in rows:
        row.pop("epoch", None)
    kept = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in kept.Tags()["scalars"] if not tag.startswith("cost/") and tag != "epoch"]
    # Two files of one second are read in the order of their names, of which number 10 comes before 9.
    scalars = {tag: sorted((event.step, event.value) for event in kept.Scalars(tag)) for tag in tags}
    return {"rows": rows, "scalars": scalars, "before": json.loads((run / "results.json").read_text())["before"]}


def test_a_run_in_pieces_shows_what_a_run_in_one_piece_shows(
    tiny_backbone: Path, text_folder: Path, tmp_path: Path
) -> None:
    every_two = tmp_path / "callbacks.yaml"
    every_two.write_text(
        "trainer:\n  callbacks:\n    - class_path: callbacks.checkpoint.LastCheckpoint\n"
        "      init_args: {every_n_train_steps: 2}\n"
    )

    def run(name: str, steps: int, *more: str) -> int:
        options = [*tiny(tiny_backbone, text_folder, tmp_path / name), "--config", str(every_two)]
        options = [o for o in options if o not in ("--trainer.callbacks.figures", "false")]
        options += ["--trainer.max_steps", str(steps), "--model.scheduler.total_steps", "6"]
        options += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
        return main(["fit", *options, *more])

    again = ["--ckpt_path", "last"]
    assert run("whole", 6) == 0
    for name, steps in (("ended at 3", 3), ("ended at 4", 4)):  # where nothing is validated, and where it is
        assert run(name, steps) == 0 and run(name, 6, *again) == 0
    with pytest.raises(RuntimeError, match="lights"):
        run("failed", 6, "--trainer.callbacks+=tests.integration.test_interrupt.Fails", "--trainer.callbacks.step", "5")
    assert run("failed", 6, *again) == 0
    names = ("whole", "ended at 3", "ended at 4", "failed")
    whole, *pieces = (curves(tmp_path / name / "memlong" / "version_0") for name in names)
    assert [step for step, _ in whole["scalars"]["train/loss"]] == list(range(6)) and whole["before"]
    for piece in pieces:
        # The run of three steps validates at its end, too.
        extra = [row for row in piece["rows"] if row not in whole["rows"]]
        assert len(extra) <= 1 and all(row["step"] == "2" and "val/perplexity" in row for row in extra)
        assert [row for row in piece["rows"] if row not in extra] == whole["rows"]
        for tag, expected in whole["scalars"].items():
            assert [e for e in piece["scalars"][tag] if e in expected or e[0] != 2] == expected, tag
        assert piece["before"] == whole["before"]
