"""A document through Lightning's ``Trainer.fit`` with the real memory callback, a time for each step."""

import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.gpu_parts.context import Context
from benchmarks.gpu_parts.models import Encoder, Numbers
from benchmarks.paired import now
from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.config import MemoryConfig
from lightning_memlong.memlong import MemLong


class Tuned(L.LightningModule):
    """What the project's module does in a training step, for a model that was not loaded by name.

    Args:
        model: The model.
    """

    def __init__(self, model: MemLong) -> None:
        super().__init__()
        self.model, self.tokenizer = model, Numbers()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss of a window, and what is to be stored."""
        output = self.model(batch["input_ids"], batch["labels"], memory=batch["memory"])
        self.log("train/loss", output.loss.detach(), batch_size=len(batch["input_ids"]))
        return {"loss": output.loss, "keys": output.keys, "values": output.values}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The paper's."""
        return torch.optim.AdamW(self.model.trainable().values(), lr=5e-5, weight_decay=1e-4)


class Memory(MemoryBankCallback):
    """The real callback with an encoder of random weights.

    Args:
        config: The memory settings.
        encoder: The encoder.
    """

    def __init__(self, config: MemoryConfig, encoder: Encoder) -> None:
        super().__init__(config)
        self._retriever = encoder


class StepTimes(L.Callback):
    """Seconds from each step's begin to the next one's: everything is in them. Ends the run when time is over.

    Args:
        context: Whose clock is looked at.
    """

    def __init__(self, context: Context) -> None:
        self._context, self._marks = context, []  # type: ignore[var-annotated]

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A step begins."""
        self._marks.append(now())
        if self._context.clock.left <= 0:
            trainer.should_stop = True

    def on_train_end(self, *_: Any) -> None:
        """The last one has ended."""
        self._marks.append(now())


class Document(IterableDataset[dict[str, torch.Tensor]]):
    """Windows of one document of random tokens, as the project's DataModules give them.

    Args:
        vocabulary: Tokens there are.
        window: Tokens of a window.
        begin: Place of the first one [tokens].
        count: Windows.
    """

    def __init__(self, vocabulary: int, window: int, begin: int, count: int) -> None:
        self._vocabulary, self._window, self._begin, self._count = vocabulary, window, begin, count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Window by window; the same tokens at the same place."""
        for number in range(self._count):
            offset = self._begin + number * self._window
            mixer = torch.Generator().manual_seed(offset)
            ids = torch.randint(5, self._vocabulary, (1, self._window), generator=mixer)
            facts = {"length": self._window, "document_id": 0, "offset": offset, "overlap": 0}
            batch = {name: torch.tensor([value]) for name, value in facts.items()}
            yield {"input_ids": ids, "labels": ids, "document_start": torch.tensor([offset == 0]), **batch}


def fit(context: Context, module: Tuned, memory: Memory, document: Document) -> list[float]:
    """Train on a document; gives the seconds of each step."""
    times = StepTimes(context)
    trainer = L.Trainer(
        accelerator="gpu" if context.cuda else "cpu", devices=1, max_epochs=1, callbacks=[times, memory],
        precision="bf16-true" if context.cuda else "32-true", gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    begin = time.monotonic()
    trainer.fit(module.train(), DataLoader(document, batch_size=None))
    module.to(context.device)  # Lightning leaves it on the CPU
    assert times.seconds, f"no step in {time.monotonic() - begin:.0f} s"
    return times.seconds
