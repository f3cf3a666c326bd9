"""MemLong (arXiv 2408.16967): a decoder language model with a long memory, on one GPU.

Importing this package has no side effects, and the names below are loaded on first use, so that
``from lightning_memlong import MemoryBank`` needs neither Lightning nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOM = {
    "Conversation": "generation",
    "MemLong": "memlong",
    "MemLongModule": "training",
    "MemoryBank": "bank",
    "MemoryConfig": "config",
    "ModelConfig": "config",
    "Retrieved": "bank",
    "RetrieverConfig": "config",
    "TuningConfig": "config",
    "UserError": "errors",
    "retrieval_causal_attention": "attention",
}
__all__ = ["__version__", *_ROOM]


def __getattr__(name: str) -> Any:
    """Load a public name from its room on first use (PEP 562)."""
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM[name]}"), name)
