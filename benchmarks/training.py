"""A training step of a configuration, everything included, outside of Lightning's loop: what benchmarks time."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import now
from lightning_memlong.cli.main import MemLongCLI

CONFIG = str(Path(__file__).parents[1] / "conf" / "memlong.yaml")


class Training:
    """Model, memory, data and optimiser of the default configuration.

    Args:
        options: Further options of train.py.
    """

    def __init__(self, options: list[str]) -> None:
        plain = ["--config", CONFIG, "--trainer.logger", "false", "--trainer.callbacks", "null"]
        cli = MemLongCLI([*plain, *options], run=False)
        self.module, self.callback, self.data = cli.model.train(), cli.trainer.callbacks[0], cli.datamodule
        assert type(self.callback).__name__ == "MemoryBankCallback"
        self.device = cli.trainer.strategy.root_device
        self.module.to(self.device)
        self.data.setup("fit")
        self.callback.setup(cli.trainer, self.module, "fit")
        self.optimizer = self.module.configure_optimizers()["optimizer"]

    def step(self, batch: dict[str, Any], memory: bool = True) -> float:
        """Seconds of a step, with memory or without."""
        start = now()
        batch = {k: v.to(self.device) for k, v in batch.items()}
        if memory:
            self.callback.retrieve("train", batch, self.module)
        output = self.module(batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.model.trainable().values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if memory:
            self.callback.store("train", {"keys": output.keys, "values": output.values}, batch, self.module)
        return now() - start
