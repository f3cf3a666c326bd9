"""The LightningModule and what only training needs."""

from lightning_memlong.training.loss_weights import require_memory
from lightning_memlong.training.module import MemLongModule
from lightning_memlong.training.schedule import LinearWarmup

__all__ = ["LinearWarmup", "MemLongModule", "require_memory"]
