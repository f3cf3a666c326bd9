"""A run that stops in the middle of a document goes on as if it had not, through Lightning and the real callback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.config import MemoryConfig, RetrieverConfig
from tests.gpu.conftest import error

STEPS = 5
SETTINGS = {"chunk_size": 16, "capacity": 128, "top_k": 3, "retriever": RetrieverConfig("hashing")}


def fit(
    parts: tuple[Any, Any], device: torch.device, backbone: Path, text: Path, steps: int, ckpt: Path | None = None
) -> tuple[L.Trainer, Any, MemoryBankCallback]:
    """Train a tiny model on real streams for so many steps altogether."""
    module_class, data_class = parts
    L.seed_everything(0, verbose=False)
    module = module_class(str(backbone), memory_layer=1, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    memory = MemoryBankCallback(MemoryConfig(**SETTINGS))
    data = data_class(
        tokenizer=str(backbone), chunk_size=16, path=str(text), window=64, validation_fraction=0.2, batch_size=2
    )
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_steps=steps, callbacks=[memory],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, use_distributed_sampler=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, **({} if ckpt is None else {"weights_only": False}))
    assert trainer.global_step == steps and module.device.type == device.type
    return trainer, module, memory


def test_two_halves_are_one_run(
    device: torch.device,
    tiny_backbone: Path,
    text_folder: Path,
    tmp_path: Path,
    measured: Callable[[str, float, float], None],
) -> None:
    pytest.importorskip("jsonargparse")  # Lightning's module of the command line, whose types ours names, needs it
    from datamodules.local_text import LocalText
    from lightning_memlong.training import MemLongModule

    parts = MemLongModule, LocalText
    _, whole, bank = fit(parts, device, tiny_backbone, text_folder, 2 * STEPS)
    trainer, _, half = fit(parts, device, tiny_backbone, text_folder, STEPS)
    assert len(half.banks["train"].entries(0)) and len(half.banks["train"].entries(1)), "documents have begun"
    file = tmp_path / "half.ckpt"
    trainer.save_checkpoint(file)
    _, resumed, other = fit(parts, device, tiny_backbone, text_folder, 2 * STEPS, file)
    goal = 0.0 if device.type == "cpu" else 1e-5  # sums on a card come in any order
    worst = max(error(b, a) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    measured("resumed run against an unbroken one: relative error of weights", worst, goal)
    mine, theirs = bank.banks["train"].state_dict(), other.banks["train"].state_dict()
    assert mine["insertions"] == theirs["insertions"] and mine["evictions"] == theirs["evictions"] > 0
    for one, another in zip(mine["ledgers"], theirs["ledgers"], strict=True):
        assert torch.equal(one["counters"], another["counters"]) and torch.equal(one["positions"], another["positions"])
        measured("resumed run: relative error of stored keys", error(another["keys"], one["keys"]), 10 * goal)
