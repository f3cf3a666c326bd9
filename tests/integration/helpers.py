"""What integration tests share: options for a tiny run, and a callback that kills the process."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch

CONFIG = "conf/memlong.yaml"
ROOT = Path(__file__).parents[2]
EVAL = ROOT / "conf" / "eval"


def tiny(backbone: Path, text: Path, runs: Path) -> list[str]:
    """Options that turn the default run into one of seconds."""
    options = {
        "model.backbone": backbone,
        "model.memory_layer": 1,
        "memory.retriever.name": "hashing",
        "memory.chunk_size": 16,
        "memory.capacity": 128,
        "memory.top_k": 3,
        "data.path": text,
        "data.window": 64,
        "data.min_document_tokens": 64,
        "data.validation_fraction": 0.2,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 8,
        "trainer.limit_test_batches": 8,
        "trainer.callbacks.figures": "false",  # drawing takes longer than such a run
        "trainer.logger.save_dir": runs,
        "model.optimizer.lr": 0.01,
    }
    return ["--config", str(ROOT / CONFIG), *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def without_capacity(options: list[str]) -> list[str]:
    """The same for ``predict`` and ``chat``, which keep all they read."""
    at = options.index("--memory.capacity")
    return options[:at] + options[at + 2 :]


class KillAt(L.Callback):
    """Kills the process without warning once so many optimiser steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class StepNote(L.Callback):
    """Writes down each optimiser step once it is made."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        with open(self.file, "a") as file:
            file.write(f"{trainer.global_step}\n")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Places at which two nested structures of tensors and numbers differ, to the last bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [path]
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple):
        if not isinstance(b, list | tuple) or len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


class Recorder(L.Callback):
    """Writes down which windows each step saw: one line of JSON a step, in a file for each process."""

    def __init__(self, file: str) -> None:
        self.file = file

    def _write(self, trainer: L.Trainer, stage: str, number: int, batch: Any) -> None:
        facts = {"stage": stage, "step": number, "epoch": trainer.current_epoch}
        facts |= {k: batch[k].tolist() for k in ("document_id", "offset", "length")}
        facts["sum"] = [int((row * (1 + torch.arange(len(row)))).sum()) for row in batch["input_ids"]]
        with open(f"{self.file}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(facts) + "\n")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "train", trainer.global_step, batch)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._write(trainer, "test", batch_idx, batch)


def recorded(file: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a Recorder wrote."""
    return [json.loads(line) for line in Path(f"{file}.{rank}").read_text().splitlines()]


def recording(file: Path) -> list[str]:
    """Options that add a Recorder."""
    return ["--trainer.callbacks+=tests.integration.helpers.Recorder", f"--trainer.callbacks.file={file}"]


def rows_of(options: list[str]) -> list[dict[str, Any]]:
    """What an evaluation measured."""
    return [json.loads(line) for line in found_in(options, "*.jsonl").read_text().splitlines()]


def found_in(options: list[str], pattern: str) -> Path:
    """The newest file of a run folder."""
    runs = Path(options[options.index("--trainer.logger.save_dir") + 1])
    return max(runs.glob(f"memlong/*/{pattern}"), key=lambda f: f.stat().st_mtime)
