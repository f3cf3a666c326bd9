"""What a corpus is: where it is, which of it is read, and what its documents are; without options or streams."""

from collections.abc import Iterator, Sequence
from typing import Any

from .formats import COMPRESSION
from .hub import Hub
from .records import Columns, Document, Record, Shard


class Corpus:
    """Rows or files that are documents; a corpus overrides what is otherwise with it.

    Every DocumentDataModule is one, and is seen as no more than that by what finds, opens and reads its documents
    (:func:`~datamodules.resolve_source.resolve_source`, :func:`~datamodules.open_split.open_split`).
    """

    name: str = "documents"
    """For messages, and the cache's folder."""
    hub: Hub | None = None
    """Where it is on the hub."""
    columns = Columns("text")
    """Which columns of its rows are read."""
    endings: tuple[str, ...] = tuple(
        kind + packed for kind in (".txt", ".jsonl", ".ndjson", ".jsonlines") for packed in ("", *COMPRESSION)
    ) + (".parquet", ".arrow")
    """Of the files that are read from a folder."""
    empty_is_bad = True
    """Whether a document without text is a bad one; else it is a short one."""
    lines_are_rows = False
    """Whether the lines of a plain text file are rows; else the file is one."""
    cache_by_default = False
    """Whether it is tokenised before the first step where nothing else is asked for."""
    plants = False
    """Whether its documents ask at their end for what was planted in them."""

    def default_path(self) -> str | None:
        """Where the text is if neither ``path`` nor ``hub_id`` is given; None: on the hub."""
        return None

    def wanted(self, file: str) -> bool:
        """Whether a file of a folder belongs to the corpus, by its path relative to it."""
        return True

    def documents(self, shards: Sequence[Shard], index: int, start: int = 0) -> Iterator[Document]:
        """Documents that begin in a shard, from the one at row ``start`` on: here, one a row or a text file."""
        for row in shards[index].rows(start):
            yield self.document(shards, index, row)

    def document(
        self, shards: Sequence[Shard], index: int, row: Record, text: str | None = None, problem: str | None = None
    ) -> Document:
        """A document that begins at a row; its text is the row's own, or that of several rows."""
        shard, content = shards[index], row.text if text is None else text
        whole = getattr(shard, "is_text", False) and text is None
        problem = problem or row.problem or ("it is empty" if self.empty_is_bad and not content.strip() else None)
        return Document(
            shard.name if whole else f"{shard.name}:{row.number + 1}", content, (index, row.number), problem
        )

    def recipe(self) -> tuple[Any, ...]:
        """What beside the files makes the documents."""
        return type(self).__name__, self.columns, self.empty_is_bad
