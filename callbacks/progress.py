"""The progress bar of training: steps to go, perplexity, tokens per second."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Rich's bar, counting towards ``trainer.max_steps``, without the run's version number."""

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """What stands at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {k: f"{v:.1f}" if isinstance(v, float) else v for k, v in metrics.items() if k != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        # The original names the last epoch, which is -2 where steps, not epochs, end training.
        return f"Epoch {current_epoch}"
