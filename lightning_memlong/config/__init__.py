"""Settings as validated dataclasses. The text under each field is its ``--help``."""

from lightning_memlong.config.checks import (
    changed,
    flat,
    is_import_path,
    named_or_imported,
    require,
    require_choice,
)
from lightning_memlong.config.memory import (
    BankDtype,
    Granularity,
    MemoryConfig,
    Query,
    QueryPooling,
    RetrieverConfig,
    Storage,
    Use,
)
from lightning_memlong.config.model import (
    DEFAULT_MEMORY_LAYER,
    SOURCES,
    AttentionBackend,
    Fusion,
    LayerIndex,
    ModelConfig,
    Position,
    Source,
    TuningConfig,
    TuningMode,
)

__all__ = [
    "DEFAULT_MEMORY_LAYER",
    "SOURCES",
    "AttentionBackend",
    "BankDtype",
    "Fusion",
    "Granularity",
    "LayerIndex",
    "MemoryConfig",
    "ModelConfig",
    "Position",
    "Query",
    "QueryPooling",
    "RetrieverConfig",
    "Source",
    "Storage",
    "TuningConfig",
    "TuningMode",
    "Use",
    "changed",
    "flat",
    "is_import_path",
    "named_or_imported",
    "require",
    "require_choice",
]
