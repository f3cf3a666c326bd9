"""Lightning's Trainer with our subcommands; each is a method, as ``fit`` and ``test`` are."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.memory_bank import MemoryBankCallback
from lightning_memlong.distributed import say
from lightning_memlong.exported import export
from lightning_memlong.module import MemLongModule
from lightning_memlong.stored import read_checkpoint


class Trainer(L.Trainer):
    """See :class:`lightning.pytorch.Trainer`."""

    def memory_callback(self) -> MemoryBankCallback | None:
        """The memory, unless it is switched off."""
        callbacks = self.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, MemoryBankCallback)), None)

    def export(self, model: MemLongModule, output: str, ckpt_path: str | None = None, datamodule: Any = None) -> None:
        """Write a plain Hugging Face folder: adapters merged in, gates and memory settings beside the weights.

        Args:
            model: The model.
            output: Folder to write; must not exist yet.
            ckpt_path: Checkpoint to export: last (the newest of all runs), or a .ckpt file.
            datamodule: Not used.
        """
        if ckpt_path is not None:
            checkpoint = read_checkpoint(Path(ckpt_path), ckpt_path)
            model.check_checkpoint(checkpoint, complete=True)
            model.load_state_dict(checkpoint["state_dict"], strict=False)
        callback = self.memory_callback()
        memory = None if callback is None else asdict(callback.config)
        folder = export(model.model, output, model.tokenizer, memory)
        say(f"Exported: {folder}\nLoads with transformers alone, or again with --model.backbone {folder}")
