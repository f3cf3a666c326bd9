"""Everything a person types or sees: ``main`` runs the command line, ``MemLongCLI`` is it as an object."""

# Eager, as the file is called main too: a lazy name would be hidden by the module of that name once it is loaded.
from lightning_memlong.cli.main import MemLongCLI, main

__all__ = ["MemLongCLI", "main"]
