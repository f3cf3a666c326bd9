"""Everything a person types or sees: ``main`` runs the command line."""

# Eager, as the file is called main too: a lazy name would be hidden by the module of that name once it is loaded.
from lightning_memlong.cli.main import main

__all__ = ["main"]
