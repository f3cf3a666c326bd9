"""The shipped recipes: they run, and LongCE with distractors goes on exactly where it was stopped."""

from pathlib import Path

import lightning as L
import pytest
import torch

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.bank import JoinedRetrieved
from lightning_memlong.cli.main import MemLongCLI, main
from lightning_memlong.model import read_checkpoint, stored_settings
from tests.integration.helpers import ROOT, differences, tiny

BOTH = ["--model.loss_weights", "long_context", "--memory.distractors", "1", "--data.batch_size", "2",
        "--validate_first", "false", "--trainer.limit_val_batches", "2"]  # fmt: skip


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return tiny(tiny_backbone, text_folder, tmp_path / "runs")


class Seen(L.Callback):
    """Notes the kinds of records that windows were given, and what was logged of them."""

    def __init__(self) -> None:
        self.train: list[bool] = []
        self.val: list[bool] = []
        self.weights: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: object, outputs: object, batch: dict, *_: object
    ) -> None:
        self.train.append(isinstance(batch["memory"], JoinedRetrieved))
        self.weights.append(float(trainer.callback_metrics["train/loss_weight"]))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: object, outputs: object, batch: dict, *_: object
    ) -> None:
        self.val.append(isinstance(batch["memory"], JoinedRetrieved))


RECIPES = sorted((ROOT / "conf" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", [f for f in RECIPES if f.stem != "calibrate"], ids=lambda f: f.stem)
def test_every_tuning_recipe_runs(file: Path, options: list[str]) -> None:
    cut = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "2", "--validate_first", "false",
           "--trainer.callbacks+=tests.integration.test_recipes.Seen"]  # fmt: skip
    cli = MemLongCLI(["fit", *options[:2], "--config", str(file), *options[2:], *cut])
    assert cli.trainer.global_step == 3 and cli.trainer.precision == "bf16-mixed"
    assert cli.model.loss_weights == "long_context" and cli.datamodule.batch_size == 8
    seen = next(c for c in cli.trainer.callbacks if isinstance(c, Seen))
    assert seen.train == [False, True, True] and not any(seen.val) and len(seen.val) > 0
    assert seen.weights[0] == 1 and all(weight > 0 and weight != 1 for weight in seen.weights[1:])


@pytest.mark.parametrize("selection", ["similarity", "random"])
def test_a_stopped_run_goes_on_exactly(selection: str, options: list[str], tmp_path: Path) -> None:
    more = [*BOTH, "--memory.selection", selection, "--trainer.accumulate_grad_batches", "2", "--model.tuning.mode",
            "lora", "--model.tuning.lora_rank", "2", "--model.scheduler.total_steps", "6"]  # fmt: skip
    found = []
    for name, stops in (("whole", ["6"]), ("stopped", ["3", "6"])):
        for number, steps in enumerate(stops):
            args = ["fit", *options, *more, "--trainer.logger.save_dir", str(tmp_path / name)]
            args += ["--trainer.max_steps", steps, *(["--ckpt_path", "last"] if number else [])]
            assert main(args) == 0
        found.append(torch.load(next((tmp_path / name).rglob("last.ckpt")), weights_only=True))
    for key in ("state_dict", "optimizer_states", "global_step", "memlong"):
        assert differences(found[0][key], found[1][key], key) == []
    banks = [next(v for k, v in c["callbacks"].items() if "MemoryBank" in k) for c in found]
    assert differences(*banks) == [] and found[0]["global_step"] == 6


def test_what_is_evaluated_knows_nothing_of_it(options: list[str]) -> None:
    """Neither is stored with the network; validation retrieves from each document alone."""
    fit = MemLongCLI(["fit", *options, *BOTH])
    file = Path(fit.trainer.checkpoint_callback.last_model_path)
    assert not {"loss_weights", "distractors"} & stored_settings(read_checkpoint(file, "last")).keys()
    found = []
    for more in (BOTH[:4], []):
        rows = ["--data.batch_size", "2", "--trainer.limit_val_batches", "2", "--ckpt_path", "last"]
        cli = MemLongCLI(["validate", *options, *more, *rows])
        found.append(float(cli.trainer.callback_metrics["val/perplexity"]))
    assert found[0] == found[1]
    bank = next(c for c in fit.trainer.callbacks if isinstance(c, MemoryBankCallback))
    assert bank.config.distractors == 1


def test_calibration_learns_biases_alone_and_they_can_be_used(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ["--config", str(ROOT / "conf" / "recipes" / "calibrate.yaml")]
    steps = ["--trainer.max_steps", "3", "--validate_first", "false", "--data.window", "64", "--data.stride", "32"]
    steps += ["--model.memory_near", "0"]  # in texts this short, all of memory is near
    at = options.index("--trainer.callbacks.figures")  # options of the last callback, which is another one here
    cli = MemLongCLI(["fit", *options[:2], *recipe, *options[2:at], *options[at + 2 :], *steps])
    biases = cli.model.model.memory_bias
    scales = cli.model.model.memory_scale
    learned = {f"{name}.{layer}" for name in ("memory_bias", "memory_scale") for layer in biases}
    assert set(cli.model.model.trainable()) == learned
    assert all(any(bool(number.any()) for number in numbers.values()) for numbers in (biases, scales))
    file = next(tmp_path.rglob("memory.safetensors"))
    assert f"--model.memory_weights {file}" in capsys.readouterr().out
    used = MemLongCLI(["validate", *options, "--model.memory_weights", str(file)])
    assert all(torch.equal(used.model.model.memory_bias[n], biases[n].cpu()) for n in biases)
    assert all(torch.equal(used.model.model.memory_scale[n], scales[n].cpu()) for n in scales)
    few = MemLongCLI(["validate", *options, "--model.memory_weights", str(file), "--model.retrieval_layers", "2"])
    assert len(few.model.model.retrieval_layers) == 2 and {*few.model.model.memory_bias} < {*biases}
