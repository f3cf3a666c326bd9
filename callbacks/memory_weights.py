"""Writes what was learned of reading memory into a file of its own."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from lightning_memlong.model import MEMORY_WEIGHTS_FILE, save_memory_weights

from .memory_bank import memory_callback


class MemoryWeights(L.Callback):
    """At the end of training, write the number of each retrieval layer and head for ``--model.memory_weights``.

    Args:
        output: The file; None: ``memory.safetensors`` in the run's folder.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = output

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file, and say where it is."""
        if not trainer.is_global_zero:
            return  # all processes have learned the same
        memory = memory_callback(trainer)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        settings = asdict(memory.config) if memory else None
        file = save_memory_weights(pl_module.model, self.output or folder / MEMORY_WEIGHTS_FILE, settings)
        print(f"Memory weights: {file}. Use them with --model.memory_weights {file}")
