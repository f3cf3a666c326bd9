"""The progress bar of training: steps to go, perplexity, tokens per second."""

from typing import Any

import lightning as L

from lightning_memlong.training.lightning_private import EpochProgressBar


class ProgressBar(EpochProgressBar):
    """Rich's bar, counting towards ``trainer.max_steps``, without the run's version number."""

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """What stands at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {k: f"{v:.1f}" if isinstance(v, float) else v for k, v in metrics.items() if k != "v_num"}
