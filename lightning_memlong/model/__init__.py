"""The network: captures keys and values, and reads retrieved ones, in a forward pass."""

from lightning_memlong.model.attention_interface import decode
from lightning_memlong.model.card import TrainingFacts, without_folder
from lightning_memlong.model.checkpoint import (
    CHECKPOINT_FORMAT,
    check_checkpoint,
    load_weights,
    read_checkpoint,
    run_of,
    stored_settings,
    weights_digest,
)
from lightning_memlong.model.context import ContextFactory, ForwardContext
from lightning_memlong.model.export import export, exported_memory, exported_settings
from lightning_memlong.model.memory_weights import (
    MEMORY_WEIGHTS_FILE,
    recognise_backbone,
    save_memory_weights,
    warn_of_other_memory,
)
from lightning_memlong.model.model import MemLongModel
from lightning_memlong.model.output import MemLongOutput
from lightning_memlong.model.reading import Reading, as_reading, reading, watching
from lightning_memlong.model.watch import Watch, WatchedSet

__all__ = [
    "CHECKPOINT_FORMAT",
    "MEMORY_WEIGHTS_FILE",
    "ContextFactory",
    "ForwardContext",
    "MemLongModel",
    "MemLongOutput",
    "Reading",
    "TrainingFacts",
    "Watch",
    "WatchedSet",
    "as_reading",
    "check_checkpoint",
    "decode",
    "export",
    "exported_memory",
    "exported_settings",
    "load_weights",
    "read_checkpoint",
    "reading",
    "run_of",
    "recognise_backbone",
    "save_memory_weights",
    "stored_settings",
    "warn_of_other_memory",
    "watching",
    "weights_digest",
    "without_folder",
]
