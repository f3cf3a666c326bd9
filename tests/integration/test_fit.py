"""``train.py fit`` as a user runs it, on a tiny backbone and real streams."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.cli.main import MemLongCLI, main
from tests.integration.helpers import ROOT, differences, tiny


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path, tmp_path: Path) -> list[str]:
    return tiny(tiny_backbone, text_folder, tmp_path / "runs")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    return found


def test_fit_validate_test(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "runs" / "memlong" / "version_0"
    assert "before training" in out and "after training" in out and "memory off" in out
    assert str(run) in out.replace("\n", "") and f"tensorboard --logdir {run.parent}" in out
    record = json.loads((run / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__ and record["seed"] == 0 and record["git_commit"]
    assert (run / "config.yaml").exists() and (run / "config_files" / "0-memlong.yaml").exists()
    found = scalars(run)
    for tag in ("train/loss", "train/perplexity", "val/perplexity", "val/perplexity_memory_off", "memory/fill",
                "memory/insertions", "memory/evictions", "memory/score", "memory/distance_tokens",
                "cost/tokens_per_second", "cost/host_memory_gb", "attention/memory_mass_layer_1",
                "attention/memory_mass_layer_3"):  # fmt: skip
        assert tag in found, tag
    assert len(found["val/perplexity"]) == 2 and len(found["train/loss"]) == 4
    assert all(0 < share < 1 for share in found["attention/memory_mass_layer_2"].values())
    assert found["memory/insertions"][3] > 0 and found["memory/fill"][3] > 0

    before = (run / "config.yaml").read_text()
    for subcommand in ("validate", "test"):
        assert main([subcommand, *options, "--ckpt_path", "last", "--trainer.logger.version", "version_0"]) == 0
    assert main(["test", *options, "--ckpt_path", "last", "--trainer.logger.version", "version_0"]) == 0
    assert (run / "config.yaml").read_text() == before
    assert all((run / f"config_{name}.yaml").exists() for name in ("validate", "test", "test_2"))
    assert "memory on" in capsys.readouterr().out


def test_evaluation_of_a_checkpoint_gives_the_numbers_of_training(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fit = MemLongCLI(["fit", *options])
    trained = float(fit.trainer.callback_metrics["val/perplexity"])
    bank = next(c for c in fit.trainer.callbacks if isinstance(c, MemoryBankCallback)).banks["train"]
    assert bank.insertions == 4 * 64 // 16, "what is validated on never enters the training bank"
    again = MemLongCLI(["validate", *options, "--ckpt_path", "last"])
    assert float(again.trainer.callback_metrics["val/perplexity"]) == pytest.approx(trained, rel=1e-6)
    smaller = MemLongCLI(["validate", *options, "--ckpt_path", "last", "--memory.top_k", "1"])
    assert float(smaller.trainer.callback_metrics["val/perplexity"]) != pytest.approx(trained, rel=1e-6)


def test_gates_alone_can_be_trained_from_the_first_window_on(options: list[str]) -> None:
    gated = ["--model.fusion", "gated", "--model.tuning.mode", "gates_only"]
    cli = MemLongCLI(["fit", *options, *gated, "--validate_first", "false"])
    gates = cli.model.model.gates
    assert len(gates) == 3 and all(gate.abs().max() > 0 for gate in gates.values())
    assert float(cli.trainer.callback_metrics["val/perplexity_ratio"]) != 1.0


def test_a_checkpoint_is_evaluated_in_other_windows(options: list[str]) -> None:
    main(["fit", *options, "--validate_first", "false"])
    other = ["--data.window", "128", "--data.stride", "64", "--data.batch_size", "2", "--seed_everything", "7"]
    assert main(["test", *options, "--ckpt_path", "last", *other]) == 0


def test_a_resumed_run_takes_a_typed_learning_rate(options: list[str]) -> None:
    first = MemLongCLI(["fit", *options, "--validate_first", "false"])
    more = ["--ckpt_path", "last", "--trainer.max_steps", "6", "--validate_first", "false"]
    again = MemLongCLI(
        ["fit", *options, *more, "--model.optimizer.lr", "0.002", "--model.optimizer.weight_decay", "0.5"]
    )
    group = again.trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.002, 0.5) and again.trainer.global_step == 6
    assert first.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.01
    schedule = again.trainer.lr_scheduler_configs[0].scheduler
    assert schedule.base_lrs == pytest.approx([0.002, 0.01, 0.002])
    assert group["lr"] == schedule.get_last_lr()[0] <= 0.002


def test_frozen_weights_do_not_move_and_tuned_ones_do(options: list[str], tiny_backbone: Path) -> None:
    options += ["--model.memory_near", "0"]  # biases are of what stands far
    before = MemLongCLI(options, run=False).model.model.state_dict()
    cli = MemLongCLI(["fit", *options])
    after, trained = cli.model.model.state_dict(), set(cli.model.model.trainable())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained and len(before) > len(trained) > 0
    saved = torch.load(cli.trainer.checkpoint_callback.last_model_path, weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in trained}


class Modes(L.Callback):
    """Notes which decoder layers are in training mode while a step is computed."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append([layer.training for layer in pl_module.model.tuning.layers])


def test_tuned_layers_train_in_training_mode(options: list[str]) -> None:
    """Also after validation: dropout and gradient checkpointing depend on it."""
    again = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    cli = MemLongCLI(["fit", *options, *again, "--trainer.callbacks+=tests.integration.test_fit.Modes"])
    modes = next(c for c in cli.trainer.callbacks if isinstance(c, Modes)).seen
    assert modes == [[False, False, True, True]] * 6


def batches(cli: MemLongCLI, changed: int | None) -> list[torch.Tensor]:
    """Logits of the first validation windows, the second part of one of them changed or not."""
    cli.datamodule.setup("validate")
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback))
    callback.setup(cli.trainer, cli.model, "validate")
    logits = []
    with torch.no_grad():
        for i, batch in enumerate(cli.datamodule.val_dataloader()):
            if i == changed:
                batch["input_ids"][:, 40:] = batch["input_ids"][:, :24].flip(1)
            callback.retrieve("val", batch, cli.model)
            output = cli.model.eval()(batch)
            callback.store("val", {"keys": output.keys, "values": output.values}, batch, cli.model)
            logits.append(output.logits[0])
            if i == 6:
                break
    return logits


def assert_causal(options: list[str], *more: str, windows: Iterable[int] = (2,)) -> None:
    """Changing the end of a window changes nothing before it, and what comes after."""
    plain, *others = (
        batches(MemLongCLI([*options, "--memory.top_k", "1", *more], run=False), at) for at in (None, *windows)
    )
    for at, changed in zip(windows, others, strict=True):
        for before, after in zip(plain[:at], changed[:at], strict=True):
            assert torch.equal(before, after)
        torch.testing.assert_close(changed[at][:40], plain[at][:40], atol=1e-5, rtol=0)
        assert (changed[at][40:] - plain[at][40:]).abs().max() > 1e-3
        assert (changed[at + 1] - plain[at + 1]).abs().max() > 1e-6, "the change must reach the windows after it"


def test_causality_retrieval_included(options: list[str]) -> None:
    assert_causal(options)


def test_causality_where_windows_overlap(options: list[str]) -> None:
    """A window of 64 asks with the chunks just before its last 32 tokens, which are those it is scored on."""
    assert_causal(options, "--data.stride", "32")


def test_causality_where_tokens_choose_what_they_read(options: list[str]) -> None:
    assert_causal(options, "--memory.candidates", "6", "--memory.top_k", "2")


def test_causality_where_each_chunk_retrieves_for_itself(options: list[str]) -> None:
    assert_causal(options, "--memory.granularity", "chunk")


@pytest.mark.parametrize("granularity", ["window", "chunk"])
@pytest.mark.parametrize("way", [["selection", "mix"], ["selection", "neighbours"], ["retriever.name", "hybrid"]])
def test_causality_of_each_way_of_choosing(options: list[str], way: list[str], granularity: str) -> None:
    chosen = [f"--memory.{way[0]}", way[1], "--memory.top_k", "2", "--memory.newest", "0.5"]
    assert_causal(options, *chosen, "--memory.granularity", granularity)


def test_a_window_of_one_chunk_retrieves_the_same_for_the_window_and_for_the_chunk(options: list[str]) -> None:
    one = ["--memory.chunk_size", "64", "--memory.capacity", "512", "--data.stride", "64"]
    found = [
        MemLongCLI(["validate", *options, *one, "--memory.granularity", g]).trainer.callback_metrics["val/perplexity"]
        for g in ("window", "chunk")
    ]
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-6)
    shorter = ["--data.stride", "32", "--data.batch_size", "2"]
    for selection in ("similarity", "recent", "random"):
        args = ["validate", *options, *shorter, "--memory.selection", selection]
        window, chunk = (
            float(MemLongCLI([*args, "--memory.granularity", g]).trainer.callback_metrics["val/perplexity"])
            for g in ("window", "chunk")
        )
        assert window == pytest.approx(chunk, rel=1e-6) if selection == "recent" else window != chunk


@pytest.mark.xfail(strict=True, reason="the reference code's query leaks the window being predicted")
def test_the_current_query_is_not_causal(options: list[str]) -> None:
    assert_causal(options, "--memory.query", "current", windows=range(2, 6))


def test_the_leak_is_named(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", *options, "--memory.query", "current"])
    captured = capsys.readouterr()
    assert "LEAKING query: current" in captured.out and "LEAKS" in captured.out + captured.err


def test_training_memory_holds_its_own_document_only(options: list[str]) -> None:
    cli = MemLongCLI([*options, "--data.batch_size", "3", "--memory.capacity", "2048"], run=False)
    cli.datamodule.setup("fit")
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback))
    callback.setup(cli.trainer, cli.model, "fit")
    stream = cli.datamodule.streams["train"]
    for i, batch in enumerate(stream):
        callback.retrieve("train", batch, cli.model)
        outputs = cli.model.model(batch["input_ids"])
        callback.store("train", {"keys": outputs.keys, "values": outputs.values}, batch, cli.model)
        for row, document in enumerate(batch["document_id"].tolist()):
            held = callback.banks["train"].entries(row)
            if document < 0:
                continue
            end = int(batch["offset"][row] + batch["length"][row])
            assert int(held.lengths.sum()) == end, "all of this document so far, and nothing else"
            text = stream.cache.tokens(document, 0, end)
            assert held.positions.tolist() == list(range(0, len(text), 16))
        if i == 30:
            break


def test_the_five_keys_of_a_batch_are_enough(options: list[str]) -> None:
    cli = MemLongCLI(options, run=False)
    cli.datamodule.setup("validate")
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback))
    callback.setup(cli.trainer, cli.model, "validate")
    for i, whole in enumerate(cli.datamodule.val_dataloader()):
        names = ("input_ids", "labels", "length", "document_start", "document_id")
        batch = {k: whole[k] for k in names}
        callback.retrieve("val", batch, cli.model)
        assert torch.equal(batch["offset"], whole["offset"]) and torch.equal(batch["overlap"], whole["overlap"])
        output = cli.model.model(batch["input_ids"])
        callback.store("val", {"keys": output.keys, "values": output.values}, batch, cli.model)
        if i == 20:
            break


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_agrees_with_single(options: list[str], precision: str) -> None:
    wide = MemLongCLI(["validate", *options]).trainer.callback_metrics
    half = MemLongCLI(["fit", *options, "--trainer.precision", precision])
    for name in ("perplexity", "perplexity_memory_off"):
        assert half._first[name] == pytest.approx(float(wide[f"val/{name}"]), rel=0.02)
    assert half.model.model.backbone.model.rotary_emb.inv_freq.dtype == torch.float32
    again = MemLongCLI(["validate", *options, "--trainer.precision", precision, "--ckpt_path", "last"])
    trained = float(half.trainer.callback_metrics["val/perplexity"])
    assert float(again.trainer.callback_metrics["val/perplexity"]) == pytest.approx(trained, rel=1e-3)


def test_where_keys_and_values_live_changes_nothing(options: list[str], tmp_path: Path) -> None:
    losses = []
    for where in ("device", "host", "disk"):
        more = ["--memory.storage", where, "--validate_first", "false", "--model.gradient_checkpointing", "true"]
        cli = MemLongCLI(["fit", *options, *more, "--trainer.logger.save_dir", str(tmp_path / where)])
        losses.append(scalars(tmp_path / where / "memlong" / "version_0")["train/loss"])
        bank = next(c for c in cli.trainer.callbacks if isinstance(c, MemoryBankCallback)).banks["train"]
        assert bank.storage == where and bank.insertions > 8
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 4


@pytest.mark.parametrize("cache", ["true", "false"])
def test_keys_and_values_left_out_of_a_checkpoint_are_read_again(
    cache: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.source", "single", "--model.retrieval_layers", "[1,3]", "--data.batch_size", "2", "--data.cache",
            cache, "--data.num_workers", "0", "--data.window", "64", "--data.stride", "32", "--validate_first", "false",
            "--memory.capacity", "256", "--model.tuning.mode", "none", "--model.fusion", "gated"]  # fmt: skip
    more[more.index("none")] = "gates_only"
    banks = []
    for name, kept in (("kept", "true"), ("left_out", "false")):
        args = [*options, *more, "--memory.save_keys_values", kept, "--trainer.logger.save_dir", str(tmp_path / name)]
        args += ["--config", str(tmp_path / "every.yaml")]
        (tmp_path / "every.yaml").write_text(
            "trainer:\n  callbacks:\n    - class_path: callbacks.checkpoint.LastCheckpoint\n"
            "      init_args: {every_n_train_steps: 4}\n"
        )
        main(["fit", *args])
        resumed = MemLongCLI(["fit", *args, "--ckpt_path", "last", "--trainer.max_steps", "9"])
        callback = next(c for c in resumed.trainer.callbacks if isinstance(c, MemoryBankCallback))
        banks.append(callback.banks["train"].state_dict())
    sizes = [next((tmp_path / name).rglob("last.ckpt")).stat().st_size for name in ("kept", "left_out")]
    assert sizes[1] < sizes[0]
    assert banks[0]["insertions"] == banks[1]["insertions"] > 8
    for a, b in zip(banks[0]["ledgers"], banks[1]["ledgers"], strict=True):
        assert a["positions"].tolist() == b["positions"].tolist() and len(a["positions"]) > 8
        for name in ("keys", "values"):
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


KILL = "tests.integration.helpers.KillAt"


@pytest.mark.slow
def test_killed_run_resumes_to_the_last_digit(tiny_backbone: Path, tmp_path: Path) -> None:
    """Two epochs of two documents; SIGKILL in the middle of a document of the second."""
    words = (ROOT / "README.md").read_text().split()
    text = tmp_path / "text"
    for name, start in (("train/a.txt", 0), ("train/b.txt", 300), ("train/d.txt", 200), ("validation/c.txt", 100)):
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        (text / name).write_text(" ".join(f"ka{w[:1]} los{w[-1:]} mith" for w in words[start : start + 130]))

    def fit(runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
        options = tiny(tiny_backbone, text, runs)
        changes = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "7", "--memory.selection", "random",
                   "--model.tuning.mode", "lora", "--model.tuning.lora_rank", "2", "--model.tuning.lora_dropout", "0.3",
                   "--data.batch_size", "2", "--config", str(tmp_path / "checkpoints.yaml")]  # fmt: skip
        command = [sys.executable, "train.py", "fit", *options, *changes, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    (tmp_path / "checkpoints.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: callbacks.checkpoint.LastCheckpoint\n"
        "      init_args: {every_n_train_steps: 3}\n"
    )
    whole = fit(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = fit(tmp_path / "killed", f"--trainer.callbacks+={KILL}", "--trainer.callbacks.step=17")
    assert killed.returncode == -9, killed.stderr
    resumed = fit(tmp_path / "killed", "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr

    folders = [tmp_path / name / "memlong" / "version_0" for name in ("whole", "killed")]
    assert not (tmp_path / "killed" / "memlong" / "version_1").exists(), "a resumed run goes on in its own folder"
    a, b = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in folders)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "memlong", "LocalText")
    for key in keys:
        assert differences(a[key], b[key], key) == []
    assert differences(a["callbacks"]["MemoryBankCallback"], b["callbacks"]["MemoryBankCallback"]) == []
    assert a["LocalText"]["positions"][0]["epoch"] >= 1 and a["global_step"] == 20
    losses = [scalars(f)["train/loss"] for f in folders]
    assert losses[0].keys() == losses[1].keys() and losses[0] == losses[1]
