"""MemLong (arXiv 2408.16967): a decoder language model with a long memory, on one GPU.

Importing this package has no side effects, and the names below are loaded on first use, so that
``from lightning_memlong import MemoryBank`` needs neither Lightning nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MemLong": "model.model",
    "MemLongModule": "training.module",
    "MemoryBank": "bank.memory_bank",
    "Retrieved": "bank.retrieved",
    "Conversation": "generation.conversation",
    "MemoryConfig": "config",
    "RetrieverConfig": "config",
    "TuningConfig": "config",
    "UserError": "errors",
    "retrieval_causal_attention": "attention.functional",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
