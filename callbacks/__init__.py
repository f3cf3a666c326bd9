"""Lightning callbacks: the memory bank's, which retrieves and stores around each step, and observers of it.

Observers read and log, and change no logit. All are loaded on first use, so that who wants the bank's alone needs
neither TensorBoard nor matplotlib; YAML names them by their modules, such as ``callbacks.progress.ProgressBar``.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "MemoryBankCallback": "memory_bank",
    "memory_callback": "memory_bank",
    "Dashboard": "dashboard",
    "LastCheckpoint": "checkpoint",
    "ProgressBar": "progress",
    "Throughput": "throughput",
    "peak_memory_gb": "throughput",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
