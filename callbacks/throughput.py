"""Observer: tokens per second and peak memory."""

import resource
import time
from typing import Any

import lightning as L
import torch


class Throughput(L.Callback):
    """Logs ``cost/tokens_per_second`` (also on the progress bar) and peak memory while training.

    ``cost/host_memory_gb`` is the process's, ``cost/device_memory_gb`` that of its GPU, if it has one.

    Args:
        window: Steps the speed is averaged over [steps].
    """

    log: Any  # provided by Lightning once the callback belongs to a trainer

    def __init__(self, window: int = 10) -> None:
        self.window = window
        self._marks: list[tuple[float, int]] = []
        self._tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin counting."""
        self._marks = [(time.perf_counter(), 0)]
        self._tokens = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the speed of the last steps, real tokens only."""
        self._tokens += int(batch["length"].sum())
        self._marks = [*self._marks[-self.window :], (time.perf_counter(), self._tokens)]
        (start, before), (now, after) = self._marks[0], self._marks[-1]
        speed = (after - before) / max(now - start, 1e-9)
        self.log("cost/tokens_per_second", speed)
        self.log("tok/s", speed, prog_bar=True, logger=False)
        self.log("cost/host_memory_gb", host_memory_gb())
        if _on_gpu():
            self.log("cost/device_memory_gb", peak_memory_gb())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time spent validating is not training time."""
        self._marks = [(time.perf_counter(), self._tokens)]


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def host_memory_gb() -> float:
    """Peak memory of the process so far [GB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_memory_gb() -> float:
    """Peak memory so far [GB]: of the GPU if there is one in use, else of the process."""
    return torch.cuda.max_memory_allocated() / 1e9 if _on_gpu() else host_memory_gb()
