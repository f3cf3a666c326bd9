"""Observer: dashboards of the memory, in TensorBoard and what else is logged to. It changes nothing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_memlong.bank import MemoryBank, Retrieved
from lightning_memlong.config import require
from lightning_memlong.training.loggers import show_anything, show_figure, show_text, tensorboard_writers
from lightning_memlong.training.profiler import PARTS, StepProfiler

from .figures import draw_heads
from .memory_bank import memory_callback
from .retrieval_statistics import RetrievalStatistics
from .validation_record import ValidationRecord


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


PLANTED, GATES = "planted passages found", "gates, by layer"
LAYOUT = {
    "Learning": {
        "loss": _chart("train/loss", "val/loss"),
        "perplexity of validation text": _chart("val/perplexity$", "val/perplexity_memory_off"),
        "perplexity, memory on / off": _chart("val/perplexity_ratio"),
    },
    "Memory": {
        "fill": _chart("memory/fill"),
        "insertions and evictions": _chart("memory/insertions", "memory/evictions"),
        "entries never retrieved": _chart("memory/never_retrieved"),
        "evicted entries: times they were retrieved": _chart("memory/evicted_retrievals"),
        "evicted entries: share never retrieved": _chart("memory/evicted_unused"),
    },
    "Retrieval": {
        "similarity": _chart("memory/score"),
        "distance [tokens]": _chart("memory/distance_tokens"),
        "share also retrieved by the window before": _chart("retrieval/overlap"),
        PLANTED: _chart("retrieval/hit_rate"),
    },
    "Attention": {
        "share that goes to memory, by layer": _chart("attention/memory_mass_layer_.*"),
        GATES: _chart("gates/layer_.*"),
    },
    "Cost": {
        "tokens a second": _chart("cost/tokens_per_second"),
        "milliseconds a window": _chart(*(f"cost/{part}_ms" for part in PARTS.values())),
        "peak memory [GB]": _chart("cost/host_memory_gb", "cost/device_memory_gb"),
    },
}
"""TensorBoard's Custom Scalars tab; tags are regular expressions."""


class Dashboard(L.Callback):
    """Writes what the memory does: curves, a map and texts of each validation; in TensorBoard histograms, too.

    Milliseconds of a step's parts need ``trainer.profiler: lightning_memlong.training.profiler.StepProfiler``.

    Args:
        every_n_steps: Optimiser steps between two looks at the bank [steps].
        figures: Draw, at each validation, where each window's memory was retrieved from, how much each head attends to
            it, and the windows that gained and lost most by it, with what they retrieved.
    """

    def __init__(self, every_n_steps: int = 10, figures: bool = True) -> None:
        require(every_n_steps >= 1, "trainer.callbacks.every_n_steps", every_n_steps, "1 or more steps", "raise it")
        self.every_n_steps, self.figures = every_n_steps, figures
        self._record: ValidationRecord | None = None
        self._begin()

    def _begin(self) -> None:
        self._evicted: list[Tensor] = []
        self._retrieval = RetrievalStatistics()
        self._windows = 0  # read since times were last taken

    # ---- training -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Lay out the Custom Scalars tab, without the charts that would stay empty."""
        self._begin()
        _take(trainer, 1)
        hidden = set() if pl_module.model.gates else {GATES}
        hidden |= set() if trainer.datamodule.plants else {PLANTED}  # type: ignore[attr-defined]
        layout = {group: {k: v for k, v in charts.items() if k not in hidden} for group, charts in LAYOUT.items()}
        for writer in _writers(trainer):
            writer.add_custom_scalars(layout)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Take notes; every so many steps, write them."""
        self._windows += 1
        bank = _training_bank(trainer)
        if bank is not None:
            self._evicted += [dropped.counters for dropped in bank.evicted]
            self._retrieval.add(batch)
        if trainer.global_step % self.every_n_steps or not _ends_step(trainer, batch_idx):
            return
        numbers = {f"cost/{part}_ms": spent for part, spent in _take(trainer, self._windows).items()}
        numbers |= self._numbers()
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step - 1)
        for writer in _writers(trainer):
            self._histograms(writer, trainer.global_step - 1, bank, batch.get("memory"))
        self._evicted, self._windows = [], 0

    def _numbers(self) -> dict[str, float]:
        numbers = {f"retrieval/{name}": mean for name, mean in self._retrieval.take().items()}
        if self._evicted:
            counters = torch.cat(self._evicted)
            numbers["memory/evicted_retrievals"] = float(counters.mean())
            numbers["memory/evicted_unused"] = float((counters == 0).double().mean())
        return numbers

    def _histograms(self, writer: SummaryWriter, step: int, bank: MemoryBank | None, memory: Retrieved | None) -> None:
        if bank is not None and bank.insertions:
            held = [(bank.entries(row).counters, bank.ages(row)) for row in range(bank.rows)]
            for name, values in zip(("times_retrieved", "age_in_insertions"), zip(*held, strict=True), strict=True):
                if len(together := torch.cat(values)):
                    writer.add_histogram(f"memory/{name}", together, step)
        if self._evicted:
            writer.add_histogram("memory/evicted_times_retrieved", torch.cat(self._evicted), step)
        if memory is not None and bool((real := memory.scores.isfinite()).any()):
            writer.add_histogram("retrieval/scores", memory.scores[real], step)

    # ---- validation ---------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin a record of this validation."""
        named = getattr(getattr(trainer, "datamodule", None), "document_name", None)
        name_of = partial(named, "validation") if named else str
        self._record = ValidationRecord(name_of) if self._draws(trainer, pl_module) else None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note what a window retrieved and gained."""
        if self._record is not None and "memory" in batch:
            self._record.add(batch, outputs)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the map, the heads and the texts."""
        record, self._record = self._record, None
        _take(trainer, 1)  # time spent validating is no part of a training step
        self._windows = 0
        if record is None:
            return
        loggers, step = trainer.loggers, trainer.global_step
        if (figure := record.map()) is not None:
            show_figure(loggers, "retrieval/map", figure, step)
        for name, (title, values) in _of_heads(record, pl_module.model).items():
            show_figure(loggers, f"attention/{name}", draw_heads(values, title), step)
        for name, text in record.texts(pl_module.tokenizer).items():
            show_text(loggers, name, text, step)

    def _draws(self, trainer: L.Trainer, pl_module: Any) -> bool:
        shown = self.figures and trainer.is_global_zero and show_anything(trainer.loggers)
        return shown and not pl_module.sharded


def _of_heads(record: ValidationRecord, model: Any) -> dict[str, tuple[str, dict[int, Tensor]]]:
    """Numbers a layer and head, each with its title; those that the model has."""
    scales = {layer: scale.exp() for layer, scale in _numbers_of(model.memory_scale).items()}
    named = {
        "memory_mass": ("share on memory [%]", record.mean_mass() if record.mass else {}),
        "gates": ("gate", _numbers_of(model.gates)),
        "memory_bias": ("bias in memory", _numbers_of(model.memory_bias)),
        "memory_scale": ("factor on scores in memory", scales),
    }
    return {name: (title, values) for name, (title, values) in named.items() if values}


def _numbers_of(parameters: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {int(layer): values.detach().float().cpu().flatten() for layer, values in parameters.items()}


def _ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the batch that was just read ended an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _writers(trainer: L.Trainer) -> list[SummaryWriter]:
    return tensorboard_writers(trainer.loggers) if trainer.is_global_zero else []


def _training_bank(trainer: L.Trainer) -> MemoryBank | None:
    memory = memory_callback(trainer)
    return None if memory is None else memory.banks.get("train")


def _take(trainer: L.Trainer, windows: int) -> dict[str, float]:
    profiler = trainer.profiler  # type: ignore[attr-defined]
    return profiler.take(max(1, windows)) if isinstance(profiler, StepProfiler) else {}
