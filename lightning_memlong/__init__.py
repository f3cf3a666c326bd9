"""MemLong (arXiv 2408.16967): a decoder language model with a long memory, on one GPU.

The names below are loaded on first use, so that ``from lightning_memlong import MemoryBank`` needs neither Lightning
nor transformers. Importing this package has no side effects, but for a second name that packages get in a checkout.
"""

from importlib import import_module
from typing import Any

from lightning_memlong.shipped.second_names import add_second_names

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

add_second_names()


def __getattr__(name: str) -> Any:
    """Load a public name from its room on first use (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM[name]}"), name)


def _version() -> str:
    """As installed; unknown in a checkout that is not."""
    from importlib import metadata  # takes longer than all else here

    try:
        return metadata.version("lightning-memlong")
    except metadata.PackageNotFoundError:
        return "unknown"
