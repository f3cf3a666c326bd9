"""A file or folder of text; by default the sources of Python's standard library, present on every machine."""

import sysconfig
from pathlib import PurePosixPath

from .documents import DocumentDataModule


class LocalText(DocumentDataModule):
    """Text files, one document each (or rows of .jsonl and .parquet files); tokenised once and cached.

    With neither ``path`` nor ``hub_id``: the sources of Python's standard library.
    """

    name = "local-text"
    endings = (*DocumentDataModule.endings, ".md", ".tex", ".py")
    empty_is_bad = False  # a folder of sources holds empty files by design
    cache_by_default = True

    def default_path(self) -> str | None:
        """The standard library."""
        return sysconfig.get_paths()["stdlib"]

    def wanted(self, file: str) -> bool:
        """Leave out what differs from machine to machine: installed packages and test suites."""
        apart = {"site-packages", "dist-packages", "test", "tests"} & set(PurePosixPath(file).parts)
        return self.path is not None or not apart
