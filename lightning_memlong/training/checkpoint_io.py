"""Checkpoints that are there whole or not at all."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside a checkpoint's place and renames.

    Lightning's own writes into the system's folder for temporary files and moves from there, which is a copy where that
    is another file system: killed meanwhile, or on a full disk, it leaves half a file under the name of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Its content.
            path: A file; or an address, which fsspec writes.
            storage_options: As Lightning's own, none are taken.

        Raises:
            OSError: If it cannot be written; what had that name before is still there.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")  # that of a killed run is written over
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except RuntimeError as error:  # by the end of a zip file that cannot be written, which hides why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        finally:
            part.unlink(missing_ok=True)


def write_whole_checkpoints(trainer: L.Trainer) -> None:
    """Use it, unless somebody chose how checkpoints are written."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
