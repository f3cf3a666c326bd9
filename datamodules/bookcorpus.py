"""BookCorpus: novels, as whole books or as a long list of sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lightning_memlong.config import require

from .documents import DocumentDataModule
from .hub import Hub
from .records import Columns, Document, Record, Shard

LOOKED_AT = 1000


class BookCorpus(DocumentDataModule):
    """A document is a book where the source says so, else a run of consecutive rows.

    A source says so by a column (``book_column``) whose value is the same in all rows of a book, or by text files
    with empty lines between paragraphs, one book each. Otherwise rows (or lines) are sentences without any
    boundary, and are joined, one a line, until a run has ``run_characters``; a row that is as long by itself is a
    document; what is left at the end of a file joins the run before it if it is less than half as long.

    On the hub: lucadiliello/bookcorpusopen (whole books); sentences are in bookcorpus mirrors such as
    rojagtap/bookcorpus.

    Args:
        book_column: Column that says which book a row belongs to; null: book_id, doc_id, book, title or filename, if
            there is one.
        run_characters: Length of a run of sentences [characters].
        **kwargs: See :class:`DocumentDataModule`.
    """

    name = "BookCorpus"
    hub = Hub("lucadiliello/bookcorpusopen")
    lines_are_rows = True
    columns = Columns("text", likely=("book_id", "doc_id", "book", "title", "filename"))

    def __init__(self, book_column: str | None = None, run_characters: int = 200_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(run_characters >= 1, "data.run_characters", run_characters, "1 or more", "raise it")
        self.columns = replace(self.columns, book=book_column)
        self.run_characters = run_characters

    def recipe(self) -> tuple[Any, ...]:
        """What beside the files makes the documents."""
        return *super().recipe(), self.run_characters

    def documents(self, shards: Sequence[Shard], index: int, start: int = 0) -> Iterator[Document]:
        """Books or runs of a shard."""
        shard = shards[index]
        if getattr(shard, "is_text", False) and not _is_sentences(shard):
            yield from super().documents(shards, index, start)
            return
        held: _Group | None = None
        for group in self._groups(shard, start):
            if held is not None and group.tail and 2 * group.size < self.run_characters:
                held.take(group)
                continue
            if held is not None:
                yield self.document(shards, index, held.first, "".join(held.lines), held.problem)
            held = group
        if held is not None:
            yield self.document(shards, index, held.first, "".join(held.lines), held.problem)

    def _groups(self, shard: Shard, start: int) -> Iterator["_Group"]:
        """Rows that belong together. Where a group begins depends on what follows only, so any can be read again."""
        group: _Group | None = None
        lost: list[Record] = []  # rows that cannot be read, between two that say which book they are of
        for row in shard.rows(start, by_line=True):
            if row.problem is not None and row.book is None and group is not None and group.book is not None:
                lost.append(row)
                continue
            if group is not None and self._ends(group, row):
                yield group
                yield from map(_Group, lost)
                group, lost = None, []
            group = group or _Group(row, empty=True)
            for bad in lost:
                group.add(bad)
            lost = []
            group.add(row)
        if group is not None:
            if group.book is None or len(group.lines) > 1:  # what was cut off may have been its end
                for bad in lost:
                    group.add(bad)
                lost = []
            group.tail = group.book is None
            yield group
        yield from map(_Group, lost)

    def _ends(self, group: "_Group", row: Record) -> bool:
        if group.book is not None or row.book is not None:
            return row.book != group.book
        return row.problem is None and max(group.size, len(row.text)) >= self.run_characters


class _Group:
    """Consecutive rows of one book, or of one run; a row that cannot be read spoils it."""

    def __init__(self, first: Record, empty: bool = False) -> None:
        self.first, self.book, self.lines, self.size, self.tail = first, first.book, list[str](), 0, False
        self.problem: str | None = None
        if not empty:
            self.add(first)

    def add(self, row: Record) -> None:
        if row.problem is not None:
            self.problem = self.problem or f"row {row.number + 1}: {row.problem}"
            return
        self.lines.append(row.text if row.text.endswith("\n") else f"{row.text}\n")
        self.size += len(self.lines[-1])

    def take(self, tail: "_Group") -> None:
        self.lines += tail.lines
        self.problem = self.problem or tail.problem


def _is_sentences(shard: Shard) -> bool:
    """Whether a text file is a list of sentences: no empty line near its beginning."""
    rows = list(islice(shard.rows(by_line=True), LOOKED_AT))
    return len(rows) > 1 and all(row.problem or row.text.strip() for row in rows)
