"""Everything a person types or sees: ``main`` runs the command line, ``MemLongCLI`` is it as an object."""

from lightning_memlong.shipped import claim_names

claim_names()  # before anything here imports datamodules and callbacks

# Eager, as the file is called main too: a lazy name would be hidden by the module of that name once it is loaded.
from lightning_memlong.cli.main import MemLongCLI, main  # noqa: E402

__all__ = ["MemLongCLI", "main"]
