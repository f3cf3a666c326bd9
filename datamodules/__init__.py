"""DataModules: documents in, windows out. Each reads one corpus as streams of documents."""

from datamodules.local_text import LocalText

__all__ = ["LocalText"]
