"""How often the host waits for the device, in training, reading and writing: the numbers may only fall.

Counted on a simulated card (``tests/simulated_card.py``).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from callbacks.memory_bank import MemoryBankCallback
from datamodules import LocalText
from lightning_memlong import MemLong
from lightning_memlong.config import RetrieverConfig
from lightning_memlong.training import MemLongModule
from tests.simulated_card import CARD, Waits, simulated_card

MEMORY: dict[str, Any] = {"chunk_size": 16, "top_k": 3}
FINITE = "lightning_memlong/bank/checks.py require_storable"
SCORED = "lightning_memlong/backbone/lm_head.py loss"


class Steps(L.Callback):
    """Takes what was waited for in each step."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.found = waits, list[Counter[str]]()

    def on_before_zero_grad(self, *_: Any) -> None:
        self.found.append(self.waits.take()[0])


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: Any) -> None:
        """The card needs no preparation."""


KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"position": "sequential"}, {"storage": "host"}),
    ({"fusion": "gated"}, {"storage": "disk", "dtype": "int8"}),
    ({"source": "single"}, {}),
    ({}, {"candidates": 6}),
]


@pytest.mark.parametrize(("settings", "kept"), KINDS)
def test_a_training_step_waits_for_two_numbers(
    settings: Any, kept: Any, byte_backbone: Path, text_folder: Path
) -> None:
    """Whether what is stored is finite, and which tokens are scored."""
    data = LocalText(
        tokenizer=str(byte_backbone), path=str(text_folder), chunk_size=16, window=64, batch_size=2,
        min_document_tokens=64, validation_fraction=0.2,
    )  # fmt: skip
    module = MemLongModule(str(byte_backbone), memory_layer=1, **settings)
    memory = MemoryBankCallback(**MEMORY | kept, capacity=256, retriever=RetrieverConfig("hashing"))
    with simulated_card() as waits:
        steps = Steps(waits)
        trainer = L.Trainer(
            accelerator=_Accelerator(), strategy=SingleDeviceStrategy(device=CARD), max_steps=12,
            callbacks=[memory, steps], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    later = steps.found[4:]
    assert sum(map(len, later)) and all(sum(found.values()) <= 2 for found in later), later


def test_reading_waits_once_a_window_and_writing_never_for_a_token(byte_backbone: Path, text_folder: Path) -> None:
    model = MemLong.from_pretrained(byte_backbone, {**MEMORY, "retriever": {"name": "hashing"}}, memory_layer=1)
    text = (text_folder / "document-00.txt").read_text()[:1000]
    with simulated_card() as waits:
        model = model.to(CARD)
        waits.take()
        bank = model.read(text, window=64, progress=False)
        read, _ = waits.take()
        windows = -(-len(text) // 48)  # of 64 tokens that overlap by 16
        assert 0 < sum(read.values()) <= windows + 1, "and a digest of the weights, once"
        model.generate("kan lor mis", bank, window=64, max_new_tokens=4)
        waits.take()
        counts = []
        for tokens in (6, 22):  # one more chunk begins in the second
            model.generate("kan lor mis", bank, window=64, max_new_tokens=tokens)
            counts.append(sum(waits.take()[0].values()))
    assert counts[1] - counts[0] <= 4, "only where a chunk begins"
